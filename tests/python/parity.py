"""Problems of every shape the operators promise to handle, and the comparison of one with the dense reference.

A :class:`Case` says in words what a problem looks like; tensors are drawn from its seed, so that a failing case can be
repeated from its text alone. Inputs are rounded to the dtype first: the float64 truth is that of the rounded numbers.
"""

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
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMAGES = ("first", "middle", "last", "interleaved", "absent")
PADDINGS = ("none", "left", "right", "row")
LAYOUTS = ("contiguous", "transposed", "columns", "strided", "broadcast")
SINKS = ("none", "plain", "extreme", "shared")
RANGES = ("none", "window", "packed", "any", "shared")
BIASES = ("none", "plain", "forbidding", "shared")
CONTEXTS = ("all", "prompt", "scattered", "empty")
FUSIONS = ("concat", "aligned", "original")
IDS = (torch.int64, torch.int32, torch.int16, torch.int8)


@dataclass(frozen=True)
class Case:
    """One problem. Fields of attention and of alignment stand side by side; each operator reads its own."""

    length: int = 9
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    modalities: int = 2
    image: str = "middle"
    padding: str = "none"
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    ids: torch.dtype = torch.int64
    # attention
    rows: int | None = None
    own_query_modality: bool = False
    is_causal: bool = True
    scale: float | None = None
    sink: str = "plain"
    bias: str = "plain"
    ranges: str = "none"
    combine: str = "joint"
    # alignment
    kind: str = "covariance"
    context: str = "all"
    fusion: str = "concat"
    given_basis: bool = False
    float32_tables: bool = False
    seed: int = 0

    @property
    def queries(self) -> int:
        return self.length if self.rows is None else self.rows


#: Few problems that together use every option: what every implementation is held to.
STAPLES = (
    Case(length=111, heads=4, kv_heads=2, dim=40, modalities=3, padding="left", sink="extreme", bias="forbidding"),
    Case(length=63, batch=2, dim=33, modalities=4, padding="right", combine="split", image="interleaved", kind="gram"),
    Case(length=257, dim=8, is_causal=False, rows=3, sink="shared", bias="shared", context="prompt", given_basis=True),
    Case(length=300, dim=24, modalities=3, ranges="window", padding="left"),
    Case(length=300, dim=24, is_causal=False, combine="split", ranges="any", rows=140),
    Case(length=1, dim=160, layouts=("strided", "columns", "broadcast")),
)


def modality_of(case: Case) -> Tensor:
    """(B, N) ids: an image of M - 1 parts in the text (modality 0) and padding, of another size in every row."""
    n, others = case.length, case.modalities - 1
    row = torch.zeros(n, dtype=torch.long)
    start, size = {"first": (0, n // 2), "middle": (n // 4, (n + 1) // 2), "last": (n // 2, n - n // 2)}.get(
        case.image, (0, 0)
    )
    if others and case.image == "interleaved":
        row = torch.arange(n) % case.modalities
    elif others:
        row[start : start + size] = 1 + torch.arange(size) * others // max(size, 1)
    ids = row.repeat(case.batch, 1)
    for b in range(case.batch):
        count = n * (b + 1) // (case.batch + 2)
        if case.padding == "left":
            ids[b, :count] = -1
        elif case.padding == "right":
            ids[b, n - count :] = -1
    if case.padding == "row":
        ids[-1] = -1
    return ids.to(case.ids)


def ranges_of(case: Case, random: torch.Generator) -> Tensor | None:
    """(B|1, Nq, 2) bounds: a window that ends at the query, sequences packed behind each other, or anything at all."""
    n, batch = case.length, 1 if case.ranges == "shared" else case.batch
    if case.ranges == "none":
        return None
    own = torch.arange(case.queries).repeat(batch, 1) + n - case.queries
    if case.ranges == "window":
        width = torch.randint(1, n + 2, (batch, 1), generator=random)
        bounds = torch.stack([own - width + 1, own + 1], dim=-1)
    elif case.ranges == "packed":
        ends = (
            torch.cat([torch.randint(0, n, (batch, 3), generator=random), torch.full((batch, 1), n)], 1).sort().values
        )
        index = torch.searchsorted(ends, own.clamp(min=0), right=True).clamp(max=3)
        starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
        bounds = torch.stack([starts.gather(1, index), ends.gather(1, index)], dim=-1)
    else:
        bounds = torch.randint(-3, n + 4, (batch, case.queries, 2), generator=random)
    return bounds.to(torch.int16 if case.ids == torch.int8 else case.ids)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The tensor as another view; the gaps of a strided one hold NaN. Only "broadcast" changes the numbers."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "broadcast":
        return tensor[:1, :1].expand(tensor.shape)
    return tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_problem(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``modular_attention`` by name."""
    random = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(kind)

    b, hq, nq, work = case.batch, case.heads, case.queries, work_dtype(dtype)
    shapes = ((b, hq, nq, case.dim), *2 * ((b, case.kv_heads, case.length, case.dim),))
    query, key, value = (lay_out(draw(*shape), layout) for shape, layout in zip(shapes, case.layouts, strict=True))
    modality = modality_of(case)
    own = torch.randint(-1, case.modalities, (b, nq), generator=random)
    sink = bias = None
    if case.sink != "none":
        owners = (1, 1) if case.sink == "shared" else (b, hq)
        sink = draw(*owners, nq, *((2,) if case.combine == "split" else ()), kind=work)
        if case.sink == "extreme":
            levels = torch.tensor([-torch.inf, -1e30, -1e4, 1e4, 1e30, *4 * [0.0]], dtype=work)
            level = levels[torch.randint(len(levels), sink.shape, generator=random)]
            sink = torch.where(level == 0, sink, level)
    if case.bias != "none":
        owners, m = (1, 1) if case.bias == "shared" else (b, hq), case.modalities
        bias = draw(*owners, m, m, kind=work)
        if case.bias == "forbidding":
            forbidden = torch.rand(bias.shape, generator=random) < 0.4
            bias = bias.masked_fill(forbidden, -torch.inf)
    ranges = ranges_of(case, random)
    return {
        "query": query,
        "key": key,
        "value": value,
        "modality": modality,
        "query_modality": own if case.own_query_modality or nq > case.length else None,
        "is_causal": case.is_causal,
        "scale": case.scale,
        "sink": sink,
        "modality_bias": bias,
        "key_range": ranges,
        "num_modalities": case.modalities,
        "combine": case.combine,
    }


def align_problem(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``duplex_align`` by name."""
    random = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(kind)

    n, d, m = case.length, case.dim, case.modalities
    shape = (case.batch, case.kv_heads, n, d)
    key, value = (lay_out(draw(*shape), layout) for layout in case.layouts[1:])
    table = torch.float32 if case.float32_tables else dtype
    # "original" keeps the key and mixes nothing in, "aligned" the reverse; "concat" is the free fuser.
    keep = torch.eye(d, dtype=table).expand(m, d, d) if case.fusion == "original" else draw(m, d, d, kind=table)
    mix = lay_out(draw(1, m, d, d, kind=table), case.layouts[0])[0]
    if case.fusion == "aligned":
        keep, mix = torch.zeros_like(keep), torch.eye(d, dtype=table).expand(m, d, d)
    context = {
        "all": None,
        "prompt": (torch.arange(n) < (n + 1) // 2).expand(case.batch, n),
        "scattered": torch.rand(case.batch, n, generator=random) < 0.6,
        "empty": torch.zeros(case.batch, n, dtype=torch.bool),
    }[case.context]
    basis = draw(case.batch, case.kv_heads, m, d, d, kind=work_dtype(dtype)) if case.given_basis else None
    arguments = {"key": key, "value": value, "modality": modality_of(case), "keep": keep, "mix": mix}
    return arguments | {"kind": case.kind, "context": context, "basis": basis}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """A block in which ``torch.empty`` hands out NaN: a result that reads what it should have written shows it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(64).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
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
    """A gradient for each differentiable output, in its dtype; the same numbers at every call."""
    random = torch.Generator().manual_seed(11)
    return [
        torch.randn(output.shape, generator=random, dtype=torch.float64).to(output.dtype)
        if output.requires_grad
        else None
        for output in outputs
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

    By default that is in half precision. Float32 problems must be large for it, or many: see `pooled_verdict`. Options
    are the operator's, but for `device`.
    """
    beside_eager = dtype.itemsize == 2 if beside_eager is None else beside_eager
    verdicts = [one.verdict(beside_eager=beside_eager) for one in compare(name, arguments, dtype, **options)]
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
    d_map = torch.einsum("bhjm,bhjr,bhjd,mcd->bhmrc", own, unit, d_out, mix)
    d_basis = (d_map.sum(2, keepdim=True) - d_map) * inverse
    maps = (normed.sum(2, keepdim=True) - normed) @ mix
    through = [
        torch.einsum("bhjm,bhjd,mcd->bhjc", own, d_out, keep),
        torch.einsum("bhjm,bhjd,bhmcd->bhjc", own, d_out, maps) / length,
    ]
    sizes = {"d_basis": d_basis.norm().item()}
    if wide["basis"] is None:
        weight = unit if wide["kind"] == "gram" else value
        through.append(torch.einsum("bhjm,bhmrd,bhjd->bhjr", feeds, d_basis, weight) / length)
        sizes["d_value"] = torch.einsum("bhjm,bhmrd,bhjr->bhjd", feeds, d_basis, unit).norm().item()
    sizes["d_key"] = max(term.norm().item() for term in through)
    return sizes
