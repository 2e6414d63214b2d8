"""Key ranges: every masking pattern of the models they are for, against torch's own attention under a dense mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moda_attn import functional as F
from moda_attn import reference

LENGTH = 150
POSITION = torch.arange(LENGTH)
#: Two images in the text; 0 is text.
BLOCK = ((POSITION >= 20) & (POSITION < 50)).long() + 2 * ((POSITION >= 90) & (POSITION < 140)).long()
START = torch.tensor([0, 20, 90])[BLOCK]
END = torch.tensor([0, 50, 140])[BLOCK]
#: Sequences packed into one row.
CUTS = torch.tensor([0, 7, 64, 129, LENGTH])
SEQUENCE = torch.searchsorted(CUTS, POSITION, right=True) - 1


def window(width: int) -> tuple[Tensor, bool, Tensor]:
    first = POSITION - width + 1
    i, j = POSITION[:, None], POSITION[None, :]
    return torch.stack([first, torch.full_like(first, 10**9)], -1), True, (j <= i) & (j > i - width)


def prefix(length: int) -> tuple[Tensor, bool, Tensor]:
    last = (POSITION + 1).clamp(min=length)
    i, j = POSITION[:, None], POSITION[None, :]
    return torch.stack([torch.zeros_like(last), last], -1), False, (j <= i) | (j < length)


def image_blocks(width: int) -> tuple[Tensor, bool, Tensor]:
    """Causal in a window, or of the same image."""
    image = BLOCK > 0
    first = torch.where(image, torch.minimum(POSITION - width + 1, START), POSITION - width + 1)
    last = torch.where(image, END, POSITION + 1)
    i, j = POSITION[:, None], POSITION[None, :]
    same = (BLOCK[:, None] == BLOCK[None, :]) & image[:, None]
    return torch.stack([first, last], -1), False, ((j <= i) & (j > i - width)) | same


def packed(is_causal: bool) -> tuple[Tensor, bool, Tensor]:
    i, j = POSITION[:, None], POSITION[None, :]
    same = SEQUENCE[:, None] == SEQUENCE[None, :]
    ranges = torch.stack([CUTS[SEQUENCE], CUTS[SEQUENCE + 1]], -1)
    return ranges, is_causal, same & (j <= i) if is_causal else same


PATTERNS: dict[str, Callable[[], tuple[Tensor, bool, Tensor]]] = {
    "a window of 2": lambda: window(2),
    "a window of 40": lambda: window(40),
    "a window of everything": lambda: window(1000),
    "a prefix": lambda: prefix(70),
    "image blocks": lambda: image_blocks(1000),
    "image blocks and a window": lambda: image_blocks(33),
    "packed causal rows": lambda: packed(True),
    "packed rows": lambda: packed(False),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_patterns_are_those_of_a_dense_mask(pattern: str, dtype: torch.dtype):
    ranges, is_causal, mask = PATTERNS[pattern]()
    query, key, value = (torch.randn(2, heads, LENGTH, 24).to(dtype).requires_grad_() for heads in (4, 2, 2))
    ids = (BLOCK > 0).long().repeat(2, 1)
    out = F.modular_attention(query, key, value, ids, is_causal=is_causal, key_range=ranges[None])
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (query, key, value), upstream)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    truth = torch.autograd.grad(dense, wide, upstream.double())
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for got, wanted in zip((out, *gradients), (dense, *truth), strict=True):
        assert (got.double() - wanted).norm() <= bound * wanted.norm()


def test_packed_sequences_are_as_if_each_were_alone():
    """With everything in use: each sequence's rows have the results, masses and gradients of a call of its own."""
    ranges, is_causal, _ = packed(True)
    given = {
        "query": torch.randn(1, 4, LENGTH, 16, dtype=torch.float64),
        "key": torch.randn(1, 2, LENGTH, 16, dtype=torch.float64),
        "value": torch.randn(1, 2, LENGTH, 16, dtype=torch.float64),
        "sink": torch.randn(1, 4, LENGTH, dtype=torch.float64),
    }
    ids = (POSITION % 3)[None] - (POSITION == 70).long()[None] * 2
    bias = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    upstream = torch.randn(1, 4, LENGTH, 16, dtype=torch.float64)

    def run(rows: slice, **options: Tensor) -> list[Tensor]:
        parts = {name: tensor[:, :, rows].clone().requires_grad_() for name, tensor in given.items()}
        out, mass = F.modular_attention(
            **parts, modality=ids[:, rows], modality_bias=bias, is_causal=is_causal, return_mass=True, **options
        )
        return [out, mass, *torch.autograd.grad(out, list(parts.values()), upstream[:, :, rows])]

    together = run(slice(None), key_range=ranges[None])
    for start, end in zip(CUTS[:-1].tolist(), CUTS[1:].tolist(), strict=True):
        rows = slice(start, end)
        for got, wanted in zip(together, run(rows), strict=True):
            torch.testing.assert_close(got[:, :, rows], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("combine", ["joint", "split"])
def test_a_query_without_keys_gives_zeros_and_no_gradient(combine: str):
    query, key, value = (torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3))
    sink = torch.randn(1, 2, 20, *((2,) if combine == "split" else ()), requires_grad=True)
    ranges = torch.tensor([[3, 3], [9, 2], [25, 30], [-5, 0]]).repeat(5, 1)[None]
    out, mass = F.modular_attention(
        query, key, value, torch.arange(20)[None] % 2, sink=sink, is_causal=False, key_range=ranges, combine=combine,
        return_mass=True,
    )  # fmt: skip
    gradients = torch.autograd.grad(out.sum(), (query, key, value, sink))
    assert all(not tensor.any() for tensor in (out, mass, *gradients))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_integer_dtype_and_any_strides_give_the_same_bits(dtype: torch.dtype):
    query = torch.randn(2, 2, 40, 8)
    ids = torch.zeros(2, 40, dtype=torch.long)
    ranges = torch.randint(0, 44, (1, 40, 2)).sort().values
    wanted = F.modular_attention(query, query, query, ids, is_causal=False, key_range=ranges)
    views = ranges.to(dtype), ranges.to(dtype).expand(2, 40, 2), ranges.to(dtype).transpose(1, 2).contiguous().mT
    for view in views:
        assert torch.equal(F.modular_attention(query, query, query, ids, is_causal=False, key_range=view), wanted)


def test_a_range_says_nothing_about_other_rows():
    """Decoding with a window: the last query alone, with its own range, is the last row of the whole."""
    query, key = torch.randn(1, 4, 60, 16), torch.randn(1, 2, 60, 16)
    ids = torch.zeros(1, 60, dtype=torch.long)
    last = torch.arange(1, 61)
    ranges = torch.stack([last - 10, last], -1)[None]
    whole = F.modular_attention(query, key, key, ids, key_range=ranges)
    step = F.modular_attention(query[:, :, -1:], key, key, ids, key_range=ranges[:, -1:])
    torch.testing.assert_close(step, whole[:, :, -1:])
    cut = F.modular_attention(query[:, :, -1:], key[:, :, -10:], key[:, :, -10:], ids[:, -10:])
    torch.testing.assert_close(step, cut)


def test_the_reference_has_the_same_ranges():
    ranges, is_causal, mask = image_blocks(33)
    query, key = torch.randn(1, 2, LENGTH, 8, dtype=torch.float64), torch.randn(1, 1, LENGTH, 8, dtype=torch.float64)
    ids = (BLOCK > 0).long()[None]
    out = reference.modular_attention(query, key, key, ids, is_causal=is_causal, key_range=ranges[None])
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, dense)
