"""Problems of every shape the operators promise to handle: a :class:`Case` says in words what one looks like.

Tensors are drawn from its seed, so that a failing case can be repeated from its text alone. Inputs are rounded to the
dtype first: the float64 truth is that of the rounded numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMAGES = ("first", "middle", "last", "interleaved", "absent")
PADDINGS = ("none", "left", "right", "row")
LAYOUTS = ("contiguous", "transposed", "columns", "strided", "sliced", "broadcast")
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
    if layout == "sliced":
        return torch.cat([torch.full_like(tensor[:, :, :1], torch.nan), tensor], dim=2)[:, :, 1:]
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


def sink_problem(
    case: Case, dtype: torch.dtype, *, span: int, decay: float = 0.5, base: float = -4.0, spread: float = 0.2
) -> dict[str, Any]:
    """Arguments of ``pseudo_sink`` by name; decays and bases are the ones given and up to `spread` times more."""
    random = torch.Generator().manual_seed(case.seed)
    factor = 1 + spread * torch.rand(case.modalities, case.heads, generator=random, dtype=torch.float64)
    modality = modality_of(case)
    return {
        "position": ((modality >= 0).cumsum(1) - 1).clamp(min=0),
        "query_modality": modality,
        "span": span,
        "decay": (decay * factor).to(dtype),
        "base": (base * factor).to(dtype),
    }
