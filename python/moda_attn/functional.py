"""The three operators on torch tensors: differentiable, compiled in Rust, visible to ``torch.compile``.

They are the fast form of :mod:`moda_attn.reference`, which states the same formulas densely. No object of size
Nq x Nk is ever made, forward or backward; inputs are read where they lie, whatever their strides. Under
``torch.autocast`` query, key and value are cast to the autocast dtype, as torch's own attention casts them; float64
and the small tables (sink, bias, basis, keep, mix) are left as they are.

B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension, M modalities. Equation numbers are
those of "MODA: MOdular Duplex Attention" (ICML 2025, arXiv 2507.04635).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import _op
from ._mass import mass_by
from .errors import ModaTypeError

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
    """Aligns the keys of every modality with the bases of the others (equations 5 and 6).

    With unit keys ``u_j = (k_j + eps) / ||k_j + eps||`` and bases ``G^m = sum over context tokens of u_j^T w_j``, whose
    rows are normed and summed over the modalities other than ``a`` to ``T^a``, the key of a token of modality ``a``
    becomes ``k_j keep_a + u_j (T^a mix_a)``. Time is O(N D^2), memory O(M D^2) a head.

    Args:
        key: (B, Hkv, Nk, D), after rotary embedding; float64, float32, bfloat16 or float16.
        value: (B, Hkv, Nk, D), the key's dtype.
        modality: (B, Nk), any integer dtype, ids from 0 to M-1; -1 is padding: its key passes through unchanged and it
            is in no basis.
        keep: (M, D, D), the key's dtype or float32: what a modality keeps of its own key.
        mix: (M, D, D), the key's dtype or float32: what it takes of the mapped one.
        kind: ``"covariance"`` (w = value, the paper's best) or ``"gram"`` (w = unit key, equation 5).
        context: (B, Nk) bool, the tokens that may feed a basis; default every token that is not padding.
        basis: (B, Hkv, M, D, D) float32 (float64 for float64 keys), used instead of computing one: decoding with the
            basis of the prompt.
        eps: added to every component of a key before it is normalised.

    Returns:
        The aligned keys (B, Hkv, Nk, D) in the key's dtype, and the bases G (B, Hkv, M, D, D) before row norm, float32
        (float64 for float64 keys); a given basis is returned as it is. Differentiable in key, value, keep, mix, basis.

    Raises:
        ModaTypeError: an argument is no tensor, or of a dtype that is not supported here.
        ModaValueError: shapes or devices that do not fit, a modality id out of range, an option that does not exist.
    """
    aligned, computed = _op.duplex_align(key, value, modality, keep, mix, kind, context, basis, eps)
    return aligned, computed if basis is None else basis


def pseudo_sink(position: Tensor, query_modality: Tensor, span: int, decay: Tensor, base: Tensor) -> Tensor:
    """The logarithm of the pseudo-scores' total weight, one number a query row (equations 9 and 10).

    ``z_i = base + log sum_{t=0}^{e-1} exp(-t decay)`` with ``e = max(span - 1 - position_i, 0)``: the masked positions
    of a row keep pseudo-scores that take attention mass and carry no value.

    Args:
        position: (B, Nq), any integer dtype: 0-based position of each query among the real tokens of its row.
        query_modality: (B, Nq), any integer dtype, ids from 0 to M-1; -1 is padding.
        span: number of positions that a row is filled up to: the model's context window.
        decay: (M, Hq), float32 or float64, 1 / position.
        base: (M, Hq), the dtype of decay: logarithm of the first pseudo-score.

    Returns:
        (B, Hq, Nq) in decay's dtype, for ``sink`` of :func:`modular_attention`; -inf for padding and where e is 0.
        Differentiable in decay and base.

    Raises:
        ModaTypeError: an argument is no tensor, of a dtype that is not supported here, or span is no int.
        ModaValueError: shapes or devices that do not fit, a modality id out of range, a negative span.
    """
    if isinstance(span, bool) or not isinstance(span, (int, torch.SymInt)):
        raise ModaTypeError(f"span is a {type(span).__name__}; wanted an int")
    return _op.pseudo_sink(position, query_modality, span, decay, base)


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
    """Attention whose softmax also holds the row's pseudo-scores and a bias a pair of modalities (equations 7 to 10).

    ``s_ij = scale q_i . k_j + bias[m(i), m(j)]``; ``"joint"``: ``o_i = sum exp(s_ij) v_j / (sum exp(s_ij) + exp(z_i))``
    over the visible keys. A row that sees no key, or of padding, gives zeros. Memory is O(N), forward and backward.

    Args:
        query: (B, Hq, Nq, D); float64, float32, bfloat16 or float16.
        key: (B, Hkv, Nk, D), the query's dtype, Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
        value: (B, Hkv, Nk, D), the query's dtype.
        modality: (B, Nk), any integer dtype: the modality of every key; -1 is padding, which is never attended.
        query_modality: (B, Nq), the modality of every query; default the last Nq entries of `modality`.
        is_causal: query i sees key j only where ``j <= i + Nk - Nq`` (bottom-right aligned, as a cache needs it).
        scale: factor on q . k, default ``D ** -0.5``.
        sink: z, the logits of the pseudo-scores: (B|1, Hq|1, Nq), for ``"split"`` (B|1, Hq|1, Nq, 2) for self and cross
            keys; float32 (float64 for float64 queries). Default: no pseudo-scores.
        modality_bias: (B|1, Hq|1, M, M), [query modality, key modality], added to the scores; -inf forbids that pair.
            The sink's dtype. Ids must lie below its M.
        key_range: (B|1, Nq, 2), any integer dtype: query i sees key j only where ``first <= j < last``, beside padding
            and the causal limit. Bounds outside 0 .. Nk are clamped, so that a window of w keys is ``is_causal=True``
            with first = i + Nk - Nq - w + 1; a block that sees all of itself, or a prefix, is ``is_causal=False`` with
            last = its end; packed sequences have first and last = their own. Blocks of keys that no query sees cost
            nothing. Default: every key.
        combine: ``"joint"``, one softmax over the row (equation 9), or ``"split"``, one over the keys of the query's
            own modality and one over the others, each with its own sink, whose outputs add (equations 7 and 8).
        num_modalities: M, above every id and equal to that of `modality_bias`. Only ``return_mass="modality"`` needs
            it, where there is no `modality_bias`.
        return_mass: also return where the attention went: True by the relation of key and query, ``"modality"`` by the
            modality of the key.

    Returns:
        o (B, Hq, Nq, D) in the query's dtype, differentiable in query, key, value, sink and modality_bias. With
        `return_mass` also the mass in the sink's dtype, not differentiable: (B, Hq, Nq, 3), on keys of the query's own
        modality, on the others and on the pseudo-scores; with ``"modality"`` (B, Hq, Nq, M + 1), on the keys of each
        modality and on the pseudo-scores. ``"split"`` has the masses of both softmaxes added. Asking for mass by
        modality may change the rounding of o where a key head has few query rows; by relation it never does.

    Raises:
        ModaTypeError: an argument is no tensor, or of a dtype that is not supported here.
        ModaValueError: shapes or devices that do not fit, a modality id out of range, an option that does not exist,
            more queries than keys without `query_modality`.
    """
    by = mass_by(return_mass, num_modalities, has_table=modality_bias is not None)
    options = (query_modality, is_causal, scale, sink, modality_bias, key_range, combine, num_modalities, by)
    out, _, _, mass = _op.modular_attention(query, key, value, modality, *options)
    return (out, mass) if return_mass else out
