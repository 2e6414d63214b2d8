"""The three operators of the package in dense, readable torch.

This file is the truth that the kernels are tested against. It favours the formula over speed (scores are materialised,
O(Nq Nk) memory), never imports the native extension, and is differentiable by autograd. The signatures and the error
classes are those of :mod:`moda_attn.functional`.

Equation numbers are those of "MODA: MOdular Duplex Attention" (ICML 2025, arXiv 2507.04635). Inputs of bfloat16 and
float16 are computed with in float32, float64 inputs in float64.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import _checks as check
from ._linalg import unit_rows
from ._mass import mass_by
from .errors import ModaTypeError, ModaValueError

__all__ = ["duplex_align", "modular_attention", "pseudo_sink"]


def duplex_align(
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    keep: Tensor,
    mix: Tensor,
    *,
    kind: str = "covariance",
    context: Tensor | None = None,
    basis: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Map the keys of every modality by the bases of the other modalities (equations 5 and 6).

    Args:
        key, value: (B, Hkv, Nk, D), one floating dtype; keys after rotary embedding.
        modality: (B, Nk), any integer dtype; -1 is padding: never in a basis, its key passes through unchanged.
        keep, mix: (M, D, D), the key's dtype or float32; ``aligned_j = k_j keep_a + unit_j (T_a mix_a)`` with
            ``a = modality[j]``, ``unit_j`` the unit key and ``T_a`` the sum of the row-normed bases of the others.
        kind: "covariance" (``G = sum unit^T v``) or "gram" (``G = sum unit^T unit``, equation 5).
        context: (B, Nk) bool, the tokens that may feed a basis; default every token that is no padding.
        basis: (B, Hkv, M, D, D) in float32 (float64 for float64 keys), used and returned as is.
        eps: added to every component of a key before its norm is taken.

    Returns:
        The aligned keys in the key's dtype, and the bases G before row norm (B, Hkv, M, D, D).

    Raises:
        ModaTypeError, ModaValueError: an argument of the wrong kind, dtype or shape, or a modality id out of range.
    """
    given = {"key": key, "value": value, "modality": modality, "keep": keep, "mix": mix}
    optional = {"context": context, "basis": basis}
    check.tensors(**given, **{name: tensor for name, tensor in optional.items() if tensor is not None})
    dtype = check.floating(key=key, value=value)
    check.shape("key", key, ("B", "Hkv", "Nk", "D"), "(B, Hkv, Nk, D)")
    check.shape("value", value, tuple(key.shape), "the shape of key")
    batch, heads, length, dim = key.shape
    check.shape("modality", modality, (batch, length), "(B, Nk)")
    check.shape("keep", keep, ("M", dim, dim), "(M, D, D)")
    check.shape("mix", mix, tuple(keep.shape), "the shape of keep")
    for name, table in (("keep", keep), ("mix", mix)):
        check.dtype_in(name, table, (dtype, torch.float32))
    modalities = keep.shape[0]
    check.modality_ids("modality", modality, modalities)
    check.choice("kind", kind, ("covariance", "gram"))
    if context is not None:
        check.shape("context", context, (batch, length), "(B, Nk)")
        check.dtype_in("context", context, (torch.bool,))

    work = check.compute_dtype(dtype)
    padding = (modality < 0)[:, None, :, None]
    # Padding may hold anything, NaN included: it is zeroed before it can reach a product.
    raw = key.to(work).masked_fill(padding, 0)
    unit = unit_rows(raw + eps)
    if basis is None:
        weight = unit if kind == "gram" else value.to(work)
        basis = _bases(unit, weight, _context_of(modality, context, modalities))
    else:
        check.shape("basis", basis, (batch, heads, modalities, dim, dim), "(B, Hkv, M, D, D)")
        check.dtype_in("basis", basis, (work,))

    others = 1 - torch.eye(modalities, dtype=work, device=key.device)
    mapping = torch.einsum("am,bhmde->bhade", others, unit_rows(basis))
    aligned = torch.zeros_like(raw)
    for a in range(modalities):
        elsewhere = (modality != a)[:, None, :, None]
        kept = raw.masked_fill(elsewhere, 0) @ keep[a].to(work)
        mixed = unit.masked_fill(elsewhere, 0) @ (mapping[:, :, a] @ mix[a].to(work))
        aligned = aligned + (kept + mixed)
    return torch.where(padding, key, aligned.to(dtype)), basis


def _context_of(modality: Tensor, context: Tensor | None, modalities: int) -> Tensor:
    """(B, M, Nk) bool: the tokens that feed each modality's basis."""
    ids = torch.arange(modalities, device=modality.device)
    member = modality[:, None, :] == ids[None, :, None]
    return member if context is None else member & context[:, None, :]


def _bases(unit: Tensor, weight: Tensor, member: Tensor) -> Tensor:
    """``G^m = sum over member tokens j of unit_j^T weight_j``: (B, Hkv, M, D, D)."""
    bases = []
    for chosen in member.unbind(1):
        outside = ~chosen[:, None, :, None]
        bases.append(unit.masked_fill(outside, 0).transpose(-1, -2) @ weight.masked_fill(outside, 0))
    return torch.stack(bases, dim=2)


def pseudo_sink(position: Tensor, query_modality: Tensor, span: int, decay: Tensor, base: Tensor) -> Tensor:
    """The logarithm of the pseudo-scores' total weight, one number a query row (equations 9 and 10).

    ``z_i = base + log sum_{t=0}^{e_i - 1} exp(-t decay)`` with ``e_i = max(span - 1 - position_i, 0)``; computed in
    float64 for either dtype. ``decay`` may be zero (``base + log e_i``) or negative.

    Args:
        position: (B, Nq) integer, 0-based position of each query among the real tokens of its row.
        query_modality: (B, Nq) integer, -1 for padding.
        span: the constant number of positions that pseudo-scores fill up to.
        decay, base: (M, Hq), float32 or float64, one of each per query modality and query head.

    Returns:
        (B, Hq, Nq) in decay's dtype; -inf, with zero gradient, for padding rows and where ``e_i = 0``.

    Raises:
        ModaTypeError, ModaValueError: an argument of the wrong kind, dtype or shape, or a modality id out of range.
    """
    check.tensors(position=position, query_modality=query_modality, decay=decay, base=base)
    check.dtype_in("decay", decay, (torch.float32, torch.float64))
    check.floating(decay=decay, base=base)
    check.shape("position", position, ("B", "Nq"), "(B, Nq)")
    check.dtype_in("position", position, check.INTEGERS)
    check.shape("query_modality", query_modality, tuple(position.shape), "the shape of position")
    check.shape("decay", decay, ("M", "Hq"), "(M, Hq)")
    check.shape("base", base, tuple(decay.shape), "the shape of decay")
    check.modality_ids("query_modality", query_modality, decay.shape[0])
    if isinstance(span, bool) or not isinstance(span, int):
        raise ModaTypeError(f"span must be an int, got {type(span).__name__}")
    if span < 1:
        raise ModaValueError(f"span = {span}; wanted 1 or more")

    count = (span - 1 - position.long()).clamp(min=0)
    silent = ((count == 0) | (query_modality < 0))[:, None, :]
    terms = count.clamp(min=1).double()[:, None, :]
    row = query_modality.long().clamp(min=0)
    rate = decay.double()[row].transpose(1, 2)
    level = base.double()[row].transpose(1, 2)
    return torch.where(silent, -torch.inf, level + _log_geometric(rate, terms)).to(decay.dtype)


def _log_geometric(rate: Tensor, terms: Tensor) -> Tensor:
    """``log sum_{t=0}^{n-1} exp(-t rate)`` in float64 for any sign of the rate, exact also at and near zero."""
    reach = rate.abs() * terms
    near = reach < 0.1
    # log n - r(n-1)/2 + r^2(n^2-1)/24 - ...: Bernoulli series, without the cancellation of the closed form.
    small = torch.where(near, rate, 0)
    series = terms.log() - small * (terms - 1) / 2
    for power, divisor in ((2, 24), (4, -2880), (6, 181440), (8, -9676800)):
        series = series + small**power * (terms**power - 1) / divisor
    # A negative rate is summed from its largest term: sum exp(t|r|) = exp((n-1)|r|) sum exp(-t|r|).
    large = torch.where(near, 1.0, rate.abs())
    growth = torch.where(near, 0, (-rate).clamp(min=0)) * (terms - 1)
    return torch.where(near, series, growth + _log1mexp(large * terms) - _log1mexp(large))


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(-x))`` for x > 0, by the form that is accurate, in value and gradient, on either side of log 2."""
    below = x < 0.7
    small = torch.where(below, x, 0.5)
    large = torch.where(below, 1.0, x)
    return torch.where(below, torch.log(-torch.expm1(-small)), torch.log1p(-torch.exp(-large)))


@overload
def modular_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    *,
    query_modality: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Tensor | None = None,
    modality_bias: Tensor | None = None,
    key_range: Tensor | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: Literal[False] = False,
) -> Tensor: ...


@overload
def modular_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    *,
    query_modality: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Tensor | None = None,
    modality_bias: Tensor | None = None,
    key_range: Tensor | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: Literal[True, "modality"],
) -> tuple[Tensor, Tensor]: ...


def modular_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    *,
    query_modality: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Tensor | None = None,
    modality_bias: Tensor | None = None,
    key_range: Tensor | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: bool | Literal["modality"] = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose softmax also holds a pseudo-score a row and a bias a pair of modalities (equations 7 to 9).

    Args:
        query: (B, Hq, Nq, D); key, value: (B, Hkv, Nk, D), one floating dtype, Hq a multiple of Hkv.
        modality: (B, Nk) integer modality of each key, -1 for padding, which is never attended.
        query_modality: (B, Nq); default the last Nq entries of `modality`. A padding query gives zeros.
        is_causal: query i sees key j only where ``j <= i + Nk - Nq`` (bottom-right aligned, as a cache needs).
        scale: of the scores, default ``D ** -0.5``.
        sink: logits of the pseudo-scores, (B|1, Hq|1, Nq), for "split" (B|1, Hq|1, Nq, 2), own then other; float32
            (float64 for float64 queries).
        modality_bias: (B|1, Hq|1, M, M), added to the scores by modality of query and key; -inf forbids the pair.
            Its dtype as for sink.
        key_range: (B|1, Nq, 2) of integers: query i sees key j only where first <= j < last; bounds may lie outside.
        combine: "joint", one softmax over the row, or "split", one over the keys of the query's own modality plus one
            over the keys of the others, each with its own sink; an empty part gives zeros.
        num_modalities: M, above every id and that of `modality_bias`.
        return_mass: also return where the attention went; "modality" needs `num_modalities` or `modality_bias`.

    Returns:
        (B, Hq, Nq, D) in the query's dtype; with `return_mass` also (B, Hq, Nq, 3), the mass on keys of the query's own
        modality, on the others and on the pseudo-scores, not differentiable; with "modality" (B, Hq, Nq, M + 1), the
        mass on the keys of each modality and on the pseudo-scores. A row that sees no key gives zeros.

    Raises:
        ModaTypeError, ModaValueError: an argument of the wrong kind, dtype or shape, or a modality id out of range.
    """
    query_modality = _check_attention(query, key, value, modality, query_modality)
    work = check.compute_dtype(query.dtype)
    by = mass_by(return_mass, num_modalities, has_table=modality_bias is not None)
    check.choice("combine", combine, ("joint", "split"))
    _check_tables(query, sink, modality_bias, combine)
    num_modalities = _check_ids(modality, query_modality, modality_bias, num_modalities)
    _check_ranges(query, key_range)
    _, heads, rows, dim = query.shape
    columns = key.shape[2]

    # Padding may hold anything, NaN included: it is zeroed before it can reach a product.
    hidden_query, hidden_key = (query_modality < 0)[:, None, :, None], (modality < 0)[:, None, :, None]
    group = heads // key.shape[1]
    q = query.to(work).masked_fill(hidden_query, 0)
    k = key.to(work).masked_fill(hidden_key, 0).repeat_interleave(group, dim=1)
    v = value.to(work).masked_fill(hidden_key, 0).repeat_interleave(group, dim=1)

    scores = (dim**-0.5 if scale is None else scale) * (q @ k.transpose(-1, -2))
    visible = ~hidden_query & ~hidden_key.transpose(-1, -2)
    i, j = torch.arange(rows, device=q.device), torch.arange(columns, device=q.device)
    if is_causal:
        visible = visible & (j[None, :] <= i[:, None] + (columns - rows))
    if key_range is not None:
        first, last = key_range[:, None, :, :1], key_range[:, None, :, 1:]
        visible = visible & (first <= j) & (j < last)
    if modality_bias is not None:
        bias = _spread(modality_bias, query_modality, modality)
        visible = visible & (bias > -torch.inf)
        scores = scores + bias.masked_fill(bias == -torch.inf, 0)

    same = (query_modality[:, :, None] == modality[:, None, :])[:, None]
    if combine == "joint":
        probability, pseudo = _softmax(scores, visible, sink)
    else:
        own_sink, other_sink = (None, None) if sink is None else sink.unbind(-1)
        own, own_pseudo = _softmax(scores, visible & same, own_sink)
        other, other_pseudo = _softmax(scores, visible & ~same, other_sink)
        probability, pseudo = own + other, own_pseudo + other_pseudo
    out = (probability @ v).to(query.dtype)
    if by == "none":
        return out
    if by == "modality":
        each = (modality[:, :, None] == torch.arange(num_modalities or 0, device=q.device)).to(work)
        return out, torch.cat([probability @ each[:, None], pseudo[..., None]], dim=-1).detach()
    on_self = probability.masked_fill(~same, 0).sum(-1)
    on_cross = probability.masked_fill(same, 0).sum(-1)
    return out, torch.stack([on_self, on_cross, pseudo], dim=-1).detach()


def _softmax(scores: Tensor, visible: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over visible scores and sink: probabilities of the keys and of the sink, zeros where none is visible."""
    seen = visible.any(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    scores = scores.masked_fill(~visible, -torch.inf)
    column = scores.new_full(seen.shape, -torch.inf) if sink is None else sink[..., None].expand(seen.shape)
    # An infinite sink takes all mass, as the largest number does; the difference of two infinities would be NaN.
    column = column.masked_fill(~seen, -torch.inf).clamp(max=torch.finfo(column.dtype).max)
    logits = torch.cat([scores, column], dim=-1)
    # The maximum includes the sink; where nothing is seen any finite number will do.
    highest = logits.detach().amax(-1, keepdim=True).masked_fill(~seen, 0)
    weight = torch.exp(logits - highest).masked_fill(~seen, 0)
    probability = weight / weight.sum(-1, keepdim=True).masked_fill(~seen, 1)
    return probability[..., :-1], probability[..., -1]


def _spread(table: Tensor, query_modality: Tensor, modality: Tensor) -> Tensor:
    """The (B|1, Hq|1, M, M) table read at the modality of every pair: (B, Hq|1, Nq, Nk)."""
    table = table.expand(query_modality.shape[0], -1, -1, -1)
    batch = torch.arange(table.shape[0], device=table.device)[:, None, None]
    rows, columns = query_modality.long().clamp(min=0), modality.long().clamp(min=0)
    return table.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, modality: Tensor, query_modality: Tensor | None
) -> Tensor:
    """Check the five main arguments of attention; returns the modality of the queries."""
    given = {"query": query, "key": key, "value": value, "modality": modality}
    check.tensors(**given, **({} if query_modality is None else {"query_modality": query_modality}))
    check.floating(query=query, key=key, value=value)
    check.shape("query", query, ("B", "Hq", "Nq", "D"), "(B, Hq, Nq, D)")
    batch, heads, rows, dim = query.shape
    check.shape("key", key, (batch, "Hkv", "Nk", dim), "(B, Hkv, Nk, D)")
    check.shape("value", value, tuple(key.shape), "the shape of key")
    kv_heads, columns = key.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ModaValueError(f"query has {heads} heads, key has {kv_heads}; wanted a multiple of the key's heads")
    check.shape("modality", modality, (batch, columns), "(B, Nk)")
    if query_modality is None:
        if rows > columns:
            raise ModaValueError(f"{rows} queries but {columns} keys: query_modality (B, Nq) must be given")
        query_modality = modality[:, columns - rows :]
    check.shape("query_modality", query_modality, (batch, rows), "(B, Nq)")
    return query_modality


def _check_tables(query: Tensor, sink: Tensor | None, modality_bias: Tensor | None, combine: str) -> None:
    """Check shapes and dtypes of sink and bias."""
    batch, heads, rows, _ = query.shape
    work = check.compute_dtype(query.dtype)
    for name, table in (("sink", sink), ("modality_bias", modality_bias)):
        if table is not None:
            check.tensors(query=query, **{name: table})
            check.dtype_in(name, table, (work,))
    if sink is not None:
        wanted = ((batch, 1), (heads, 1), rows)
        if combine == "joint":
            check.shape("sink", sink, wanted, "(B|1, Hq|1, Nq)")
        else:
            check.shape("sink", sink, (*wanted, 2), 'for combine="split" (B|1, Hq|1, Nq, 2)')
    if modality_bias is not None:
        m = modality_bias.shape[-1] if modality_bias.dim() else 0
        check.shape("modality_bias", modality_bias, ((batch, 1), (heads, 1), m, m), "(B|1, Hq|1, M, M)")


def _check_ids(
    modality: Tensor, query_modality: Tensor, modality_bias: Tensor | None, num_modalities: int | None
) -> int | None:
    """Check that all ids lie below the number of modalities, wherever that comes from; returns it."""
    if modality_bias is not None:
        m = modality_bias.shape[-1]
        if num_modalities not in (None, m):
            raise ModaValueError(f"num_modalities is {num_modalities}; wanted {m}, the M of modality_bias")
        num_modalities = m
    check.modality_ids("modality", modality, num_modalities)
    check.modality_ids("query_modality", query_modality, num_modalities)
    return num_modalities


def _check_ranges(query: Tensor, key_range: Tensor | None) -> None:
    """Check the key ranges of attention."""
    if key_range is not None:
        check.tensors(query=query, key_range=key_range)
        check.shape("key_range", key_range, ((query.shape[0], 1), query.shape[2], 2), "(B|1, Nq, 2)")
        check.dtype_in("key_range", key_range, check.INTEGERS)
