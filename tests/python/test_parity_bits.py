"""Where results must agree bit for bit: threads, views, poisoned memory, bad rows, later tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moda_attn.numpy as N
from moda_attn import functional as F
from parity import evaluate, poisoned_memory
from problems import DTYPES, LAYOUTS, Case, align_problem, attention_problem, lay_out

COMBINES = ("joint", "split")
BATCHED = Case(length=300, batch=2, heads=6, kv_heads=2, dim=40, modalities=3, padding="left", sink="extreme")
BATCHED = replace(BATCHED, bias="forbidding", context="scattered")
#: One key head, many tokens: what threads share is then one row of blocks.
SINGLE = replace(BATCHED, length=777, batch=1, heads=4, kv_heads=1, dim=24, padding="right")
RANGED = replace(BATCHED, ranges="any", is_causal=False)


def both(case: Case, dtype: torch.dtype) -> list[tuple[Any, dict[str, Any]]]:
    """Both operators with everything they can do on one case."""
    joint, split = (attention_problem(replace(case, combine=combine), dtype) for combine in COMBINES)
    covariance, gram = (align_problem(replace(case, kind=kind), dtype) for kind in ("covariance", "gram"))
    masses = (True, "modality")
    attentions = [(F.modular_attention, {**p, "return_mass": m}) for p, m in zip((joint, split), masses, strict=True)]
    return attentions + [(F.duplex_align, problem) for problem in (covariance, gram)]


def all_bits(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Every output and gradient of every operator, as integers: NaN equals itself, and 0 differs from -0."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    results = [evaluate(operator, problem)[0] for operator, problem in both(case, dtype)]
    return [tensor.contiguous().view(integers[tensor.dtype.itemsize]) for r in results for tensor in r.values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def threads():
    """Sets the number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [BATCHED, SINGLE, RANGED], ids=["batched", "single", "ranged"])
def test_any_number_of_threads_gives_the_same_bits(case: Case, dtype: torch.dtype, threads):
    threads(1)
    alone = all_bits(case, dtype)
    for count in (2, 3):
        threads(count)
        assert same(alone, all_bits(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_memory_held_before_does_not_matter(dtype: torch.dtype):
    clean = all_bits(BATCHED, dtype)
    # The kernels' own workspaces come from the heap: the same work on NaN leaves NaN in the blocks they get next.
    query, *_, ids = (attention_problem(BATCHED, dtype)[name] for name in ("query", "key", "value", "modality"))
    nothing = torch.full_like(query, torch.nan).requires_grad_()
    F.modular_attention(nothing, nothing, nothing, ids).sum().backward()
    eye = torch.eye(BATCHED.dim, dtype=dtype).expand(3, -1, -1)
    sum(part.sum() for part in F.duplex_align(nothing, nothing, ids, eye, eye)).backward()
    with poisoned_memory():
        assert same(clean, all_bits(BATCHED, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
def test_views_give_the_bits_of_their_copies(layout: str, dtype: torch.dtype):
    case = replace(BATCHED, length=65, layouts=3 * (layout,))
    for operator, views in both(case, dtype):
        copies = {
            name: value.detach().contiguous() if isinstance(value, Tensor) else value for name, value in views.items()
        }
        assert any(isinstance(value, Tensor) and not value.is_contiguous() for value in views.values())
        (got, upstream), (wanted, _) = evaluate(operator, views), evaluate(operator, copies)
        for name, tensor in got.items():
            assert torch.equal(tensor, wanted[name]), f"{operator.__name__}: {name}"
        # The upstream gradient may be a view as well.
        turned = [None if g is None else lay_out(g, "columns") for g in upstream]
        again, _ = evaluate(operator, views, turned)
        assert all(torch.equal(tensor, again[name]) for name, tensor in got.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_negative_strides(axis: int, dtype: torch.dtype):
    """torch has no such views; NumPy does."""

    def turned(value: Any) -> Any:
        """A view with the same numbers whose axis (the last one it has, if fewer) runs backwards through memory."""
        if not isinstance(value, Tensor):
            return value
        array = value.numpy()
        last = min(axis, array.ndim - 1)
        return np.flip(np.ascontiguousarray(np.flip(array, last)), last)

    case = replace(RANGED, length=65)
    for operator, problem in both(case, dtype):
        arrays = {name: turned(value) for name, value in problem.items()}
        assert any(isinstance(a, np.ndarray) and min(a.strides) < 0 for a in arrays.values())
        got = getattr(N, operator.__name__)(**arrays)
        for array, tensor in zip(got, operator(**problem), strict=True):
            assert np.array_equal(array, tensor.numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("row", [0, 31, 110])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_query_spoils_its_own_row_alone(poison: float, row: int, combine: str, dtype: torch.dtype):
    case = Case(length=111, heads=4, kv_heads=2, dim=20, modalities=3, combine=combine)
    problem = attention_problem(case, dtype)
    clean, clean_mass = F.modular_attention(**problem, return_mass=True)
    query = problem["query"].clone()
    query[0, 2, row, 7] = poison
    out, mass = F.modular_attention(**{**problem, "query": query}, return_mass=True)
    others = torch.ones(out.shape[:3], dtype=torch.bool)
    others[0, 2, row] = False
    assert torch.equal(out[others], clean[others])
    assert torch.equal(mass[others], clean_mass[others])
    assert out[0, 2, row].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("kind", ["covariance", "gram"])
@pytest.mark.parametrize("cut", [1, 64, 150])
def test_later_tokens_change_no_earlier_bit(cut: int, kind: str, combine: str, dtype: torch.dtype):
    """Alignment with the context before the cut, then causal attention; every token from the cut on is changed."""
    case = Case(length=200, batch=2, heads=4, kv_heads=2, dim=24, modalities=3, image="interleaved", kind=kind)
    case = replace(case, combine=combine, is_causal=True)
    align, attend = align_problem(case, dtype), attention_problem(case, dtype)
    align["context"] = (torch.arange(case.length) < cut).expand(case.batch, -1)

    def outputs() -> tuple[Tensor, Tensor]:
        aligned, _ = F.duplex_align(**align)
        out, mass = F.modular_attention(**{**attend, "key": aligned, "value": align["value"]}, return_mass=True)
        return out, mass

    before = outputs()
    for problem, names in ((align, ("key", "value")), (attend, ("query",))):
        for name in names:
            problem[name][:, :, cut:] = 1 - 3 * problem[name][:, :, cut:]
    later = (align["modality"][:, cut:] + 1) % 3
    align["modality"][:, cut:] = attend["modality"][:, cut:] = later
    after = outputs()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :, :cut], new[:, :, :cut])
        assert not torch.equal(old[:, :, cut:], new[:, :, cut:])
