"""The comparison of an operator's outputs and gradients on one problem with the dense reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_attn import functional as F
from moda_attn import reference
from tolerance import Verdict, relative_l2, verdict

#: Where the operators are tried; the truth is always the CPU's.
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """A block in which ``torch.empty`` hands out NaN: a result that reads what it should have written shows it."""
    # Not `use_deterministic_algorithms`, which imports torch's compiler: four seconds of every process.
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(64).isnan().all()
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def promote(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def moved(value: Any, device: str) -> Any:
    """A tensor with the same strides on another device; anything else as it is."""
    if device == "cpu" or not isinstance(value, Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def upstream_of(outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """A gradient for each differentiable output, in its dtype; the same numbers at every call.

    It is 0 where a logit is -inf: nothing that uses such a logit depends on it.
    """
    random = torch.Generator().manual_seed(11)
    drawn = [torch.randn(output.shape, generator=random, dtype=torch.float64) for output in outputs]
    return [
        numbers.to(output.dtype).masked_fill(output.detach().cpu() == -torch.inf, 0) if output.requires_grad else None
        for output, numbers in zip(outputs, drawn, strict=True)
    ]


def evaluate(
    operator: Callable[..., Any],
    arguments: dict[str, Any],
    upstream: list[Tensor | None] | None = None,
    *,
    device: str = "cpu",
    **options: Any,
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Outputs (by number) and gradients (by ``d_`` and the argument's name) of an evaluation on a device, and the
    upstream gradients used; all of them on the CPU."""
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = operator(**{**arguments, **leaves}, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        upstream = upstream_of(outputs)
    pairs = [
        (o, moved(g, device).to(o.dtype))
        for o, g in zip(outputs, upstream, strict=True)
        if g is not None and o.requires_grad
    ]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], materialize_grads=True
    )
    results = {f"output {i}": output.detach().cpu() for i, output in enumerate(outputs)}
    return results | {f"d_{name}": g.cpu() for name, g in zip(leaves, gradients, strict=True)}, upstream


@dataclass(frozen=True)
class Comparison:
    """One result of one operator: the kernel's, the float64 truth and torch's dense eager one (none in float64)."""

    name: str
    got: Tensor
    truth: Tensor
    eager: Tensor | None
    scale: float
    dtype: torch.dtype

    def verdict(self, *, beside_eager: bool) -> Verdict:
        kind = {"gradient": self.name.startswith("d_"), "dtype": self.dtype, "scale": self.scale}
        return verdict(self.got, self.truth, name=self.name, eager=self.eager if beside_eager else None, **kind)

    def errors(self) -> tuple[float, float]:
        """The kernel's error and eager's."""
        return tuple(relative_l2(tensor, self.truth, self.scale) for tensor in (self.got, self.eager))


def compare(
    name: str, arguments: dict[str, Any], dtype: torch.dtype, *, device: str = "cpu", **options: Any
) -> list[Comparison]:
    """One operator on one problem on a device: every output and gradient, with what it is to be compared with."""
    with poisoned_memory():
        got, upstream = evaluate(getattr(F, name), arguments, device=device, **options)
    dense = getattr(reference, name)
    wide = promote(arguments)
    truth, _ = evaluate(dense, wide, upstream, **options)
    eager = {} if dtype == torch.float64 else evaluate(dense, arguments, upstream, **options)[0]
    sizes = attention_terms if name == "modular_attention" else align_terms
    scales = sizes(wide, [None if g is None else g.double() for g in upstream])
    comparisons = []
    for result, tensor in got.items():
        leaf = arguments.get(result.removeprefix("d_"))
        assert leaf is None or (tensor.dtype, tensor.shape) == (leaf.dtype, leaf.shape)
        # A float32 table is only as good as the half-precision tensors beside it, and the other way round.
        coarser = min(dtype, tensor.dtype, key=lambda d: d.itemsize)
        scale = scales.get(result, 0.0)
        comparisons.append(Comparison(result, tensor, truth[result], eager.get(result), scale, coarser))
    return comparisons


def check(
    name: str, arguments: dict[str, Any], dtype: torch.dtype, *, beside_eager: bool | None = None, **options: Any
) -> None:
    """Assert the bounds for every result; beside eager torch too where that says something about one problem alone.

    By default that is in half precision, of results of 64 numbers or more: the error of a few is luck. Float32 problems
    must be large for it, or many: see `pooled_verdict`. Options are the operator's, but for `device`.
    """
    beside_eager = dtype.itemsize == 2 if beside_eager is None else beside_eager
    results = compare(name, arguments, dtype, **options)
    verdicts = [one.verdict(beside_eager=beside_eager and one.got.numel() >= 64) for one in results]
    failed = [str(outcome) for outcome in verdicts if not outcome]
    assert not failed, f"{name} in {dtype}: " + "; ".join(failed)


def attention_terms(wide: dict[str, Any], upstream: list[Tensor | None]) -> dict[str, float]:
    """Size of the terms of the gradients that are differences: dS = P dP - P delta, and the former is the larger.

    The root of the sum of the squares of all terms: what their sum would be if their signs were independent. The
    probabilities P come from the reference, which returns them when the values are unit vectors.
    """
    query, key, value, d_out = wide["query"], wide["key"], wide["value"], upstream[0]
    (heads, dim), (_, kv_heads, nk, _) = query.shape[1::2], key.shape
    scale = dim**-0.5 if wide["scale"] is None else wide["scale"]
    width = max(dim, nk)
    wider = [torch.nn.functional.pad(tensor, (0, width - dim)) for tensor in (query, key)]
    units = torch.eye(nk, width, dtype=query.dtype).expand_as(wider[1])
    unit_problem = {**wide, "query": wider[0], "key": wider[1], "value": units, "scale": scale}
    probability, mass = reference.modular_attention(**unit_problem, return_mass=True)
    squares = probability[..., :nk] ** 2
    q, k, v, o = (tensor**2 for tensor in (query, key, value, d_out))
    k, v = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (k, v))
    terms = squares * (o @ v.transpose(-1, -2))
    sums = {
        "d_query": scale**2 * (terms.sum(-2) * k.sum(-1)).sum(),
        "d_key": scale**2 * (terms.sum(-1) * q.sum(-1)).sum(),
        "d_sink": (mass[..., 2] ** 2 * (o * (squares @ v)).sum(-1)).sum(),
        "d_modality_bias": terms.sum(),
    }
    return {name: total.sqrt().item() for name, total in sums.items()}


def align_terms(wide: dict[str, Any], upstream: list[Tensor | None]) -> dict[str, float]:
    """Size of the terms of gradients that pass a row norm: d is the larger term of dG_r = (d - g (g . d)) / ||G_r||.

    With one token in a basis the difference is zero in theory, and 1 / ||G_r|| makes its rounding as large as it likes.
    """
    key, value, ids, keep, mix = (wide[name] for name in ("key", "value", "modality", "keep", "mix"))
    basis = reference.duplex_align(**wide)[1]
    every = torch.arange(keep.shape[0])
    own = (ids[:, None, :, None] == every).to(key.dtype)
    real = (ids >= 0)[:, None, :, None]
    feeds = own if wide["context"] is None else own * wide["context"][:, None, :, None]
    length = (key + 1e-6).norm(dim=-1, keepdim=True)
    unit, d_out = (key + 1e-6) / length, upstream[0] * real
    rows = basis.norm(dim=-1, keepdim=True)
    inverse = torch.where(rows == 0, 0, 1 / rows)
    normed = basis * inverse
    # In this order no contraction holds more than a number for every token, modality and component.
    pulled = torch.einsum("bhjm,bhjd,mcd->bhjc", own, d_out, mix)
    d_map = torch.einsum("bhjm,bhjr,bhjc->bhmrc", own, unit, pulled)
    d_basis = (d_map.sum(2, keepdim=True) - d_map) * inverse
    maps = (normed.sum(2, keepdim=True) - normed) @ mix
    through = [
        torch.einsum("bhjm,bhjd,mcd->bhjc", own, d_out, keep),
        torch.einsum("bhjm,bhjd,bhmcd->bhjc", own, d_out, maps) / length,
    ]
    sizes = {"d_basis": d_basis.norm().item()}
    if wide["basis"] is None:
        weight = unit if wide["kind"] == "gram" else value
        through.append(torch.einsum("bhjm,bhjd,bhmrd->bhjr", feeds, weight, d_basis) / length)
        sizes["d_value"] = torch.einsum("bhjm,bhjr,bhmrd->bhjd", feeds, unit, d_basis).norm().item()
    sizes["d_key"] = max(term.norm().item() for term in through)
    return sizes
