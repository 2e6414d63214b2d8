"""The operators against the dense float64 reference over random shapes, token patterns, options and strides.

The examples are drawn the same way every time: a failure is a finding, not weather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moda_attn import functional as F
from moda_attn import reference
from tolerance import BOUNDS, EAGER_FACTOR, relative_l2

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Scores that the dense reference may hold at once; longer sequences get fewer heads and rows.
MAX_SCORES = 1_500_000
#: Rows (of real tokens, over all heads) and numbers below which an error is no average.
FEW, ENOUGH = 64, 4096
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 111, 128, 129, 255, 300, 511, 777, 1000, 1100)
DIMS = (8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 136, 160, 1, 3, 5, 13, 33, 65, 100)
PATTERNS = ("absent", "first", "middle", "last", "interleaved", "random", "alone")

run_settings = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@dataclass(frozen=True)
class Shape:
    """Sizes of one example."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    modalities: int


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    keys, dim = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(DIMS))
    queries = draw(st.sampled_from(sorted({1, min(5, keys), max(keys - 1, 1), keys})))
    room = max(MAX_SCORES // (keys * queries), 1)
    heads = draw(st.integers(1, min(8, room)))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    batch = draw(st.integers(1, min(3, max(room // heads, 1))))
    return Shape(batch, heads, kv_heads, queries, keys, dim, draw(st.integers(1, 4)))


def row(pattern: str, length: int, modalities: int, generator: torch.Generator) -> Tensor:
    """One row of modality ids: text with other modalities in the places the pattern names."""
    ids = torch.zeros(length, dtype=torch.long)
    other = torch.randint(1, max(modalities, 2), (length,), generator=generator) % modalities
    third = max(length // 3, 1)
    if pattern == "first":
        ids[:third] = other[0]
    elif pattern == "middle":
        ids[third : 2 * third] = other[0]
    elif pattern == "last":
        ids[-third:] = other[0]
    elif pattern == "interleaved":
        ids[::2] = other[::2]
    elif pattern == "random":
        ids = torch.randint(0, modalities, (length,), generator=generator)
    elif pattern == "alone":
        ids[:] = other[0]
    return ids


def tokens(draw: st.DrawFn, shape: Shape, generator: torch.Generator) -> Tensor:
    """(B, Nk) modality ids, padded on the left, on the right or not at all."""
    rows = [row(draw(st.sampled_from(PATTERNS)), shape.keys, shape.modalities, generator) for _ in range(shape.batch)]
    ids = torch.stack(rows)
    for b in range(shape.batch):
        side, much = draw(st.sampled_from(("left", "right", "none"))), draw(st.integers(0, shape.keys))
        if side == "left":
            ids[b, :much] = -1
        elif side == "right":
            ids[b, shape.keys - much :] = -1
    return ids


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in another layout."""
    if how == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        return torch.stack([tensor, tensor], dim=-1).flatten(-2)[..., ::2]
    return tensor


LAYOUTS = st.sampled_from(("plain", "transposed", "sliced"))


def differentiate(operator: Callable[..., Any], inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = operator(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(11)
    loss = sum(
        (output.double() * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
        for output in outputs
        if output.requires_grad
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"output {index}": output for index, output in enumerate(outputs)}
    return named | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def distance(got: Tensor, truth: Tensor, least: float) -> float:
    """Relative L2 error; a truth shorter than `least` counts as that long."""
    return (got.double() - truth).norm().item() / max(truth.norm().item(), least) if least else relative_l2(got, truth)


def compare(name: str, inputs: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> None:
    """Every output and gradient within the bounds of `dtype`, and no worse than twice dense eager torch.

    A relative error says something where there is an average to take: of fewer than FEW rows, in which the terms of a
    gradient may happen to cancel, ten times the bound is granted, and the comparison with eager torch needs ENOUGH
    numbers. It leaves out the float32 tables beside half-precision tensors, whose gradients are as good as the rounded
    output they are recomputed from.
    """
    got = differentiate(getattr(F, name), inputs, options)
    dense = getattr(reference, name)
    truth = differentiate(dense, {name: tensor.double() for name, tensor in inputs.items()}, options)
    eager = differentiate(dense, inputs, options)
    main = next(iter(inputs.values()))
    rows = main.shape[:-1].numel()
    if "modality" in options:
        rows = min(rows, main.shape[1] * int((options["modality"] >= 0).sum()))
    for what, result in got.items():
        assert not result.isnan().any(), what
        gradient = what.startswith("gradient")
        # Everything drawn is of order one. A gradient of less than that is what cancellation left; that of the bias
        # sums over all rows, and its terms cancel altogether where a row sees one modality only.
        terms = rows * main.shape[-1] if what == "gradient of modality_bias" else 1
        least = max(terms, 1) ** 0.5 if gradient else 0.0
        error = distance(result, truth[what], least)
        bound = BOUNDS[dtype][gradient] * (10 if rows < FEW else 1)
        if dtype != torch.float64 and result.dtype == dtype and rows >= FEW and result.numel() >= ENOUGH:
            peer = distance(eager[what], truth[what], least)
            bound = min(bound, EAGER_FACTOR * max(peer, torch.finfo(dtype).eps / 2))
        assert error <= bound, f"{what}: relative L2 error {error:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype):
    work = torch.float64 if dtype == torch.float64 else torch.float32

    @run_settings
    @given(st.data())
    def check(data: st.DataObject):
        draw = data.draw
        shape, seed = draw(shapes()), draw(st.integers(0, 2**31))
        generator = torch.Generator().manual_seed(seed)

        def numbers(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

        sizes = {
            "query": (shape.batch, shape.heads, shape.queries, shape.dim),
            "key": (shape.batch, shape.kv_heads, shape.keys, shape.dim),
            "value": (shape.batch, shape.kv_heads, shape.keys, shape.dim),
        }
        inputs = {name: strided(numbers(*size), draw(LAYOUTS)) for name, size in sizes.items()}
        combine = draw(st.sampled_from(("joint", "split")))
        batch, heads = draw(st.sampled_from((1, shape.batch))), draw(st.sampled_from((1, shape.heads)))
        if draw(st.booleans()):
            last = (2,) if combine == "split" else ()
            inputs["sink"] = 3 * numbers(batch, heads, shape.queries, *last, dtype=work)
        if draw(st.booleans()):
            inputs["modality_bias"] = numbers(batch, heads, shape.modalities, shape.modalities, dtype=work)
        options = {
            "modality": tokens(draw, shape, generator),
            "is_causal": draw(st.booleans()),
            "scale": draw(st.sampled_from((None, 0.25))),
            "combine": combine,
            "return_mass": draw(st.booleans()),
        }
        compare("modular_attention", inputs, options, dtype)

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment(dtype: torch.dtype):
    @run_settings
    @given(st.data())
    def check(data: st.DataObject):
        draw = data.draw
        shape, seed = draw(shapes()), draw(st.integers(0, 2**31))
        generator = torch.Generator().manual_seed(seed)
        table = draw(st.sampled_from((dtype, torch.float32))) if dtype != torch.float64 else dtype
        size = (shape.batch, shape.kv_heads, shape.keys, shape.dim)
        square = (shape.modalities, shape.dim, shape.dim)

        def numbers(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

        inputs = {
            "key": strided(numbers(size, dtype), draw(LAYOUTS)),
            "value": strided(numbers(size, dtype), draw(LAYOUTS)),
            "keep": numbers(square, table),
            "mix": numbers(square, table),
        }
        ids = tokens(draw, shape, generator)
        options = {
            "modality": ids,
            "kind": draw(st.sampled_from(("covariance", "gram"))),
            "context": draw(st.sampled_from((None, torch.rand(ids.shape, generator=generator) < 0.6))),
        }
        compare("duplex_align", inputs, options, dtype)

    check()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_pseudo_sink(dtype: torch.dtype):
    @run_settings
    @given(st.data())
    def check(data: st.DataObject):
        draw = data.draw
        shape, seed = draw(shapes()), draw(st.integers(0, 2**31))
        generator = torch.Generator().manual_seed(seed)
        ids = tokens(draw, shape, generator)
        position = ((ids >= 0).cumsum(-1) - 1).clamp(min=0)
        # No padding and a long span: where no pseudo-score is left the sink is -inf, which no norm can compare.
        decay = torch.rand(shape.modalities, shape.heads, generator=generator, dtype=dtype)
        decay = decay * draw(st.sampled_from((0.0, 1e-6, 1e-3, 1.0, 30.0)))
        base = torch.randn(decay.shape, generator=generator, dtype=dtype)
        span = draw(st.sampled_from((1200, 4096, 131072)))
        ids = ids.clamp(min=0)
        options = {"position": position, "query_modality": ids, "span": span}
        compare("pseudo_sink", {"decay": decay, "base": base}, options, dtype)

    check()
