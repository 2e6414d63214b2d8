"""The three operators on NumPy arrays, forward only: the arithmetic of :mod:`moda_attn.functional` without torch.

Arrays are read where they lie, through any strides; results are fresh, contiguous NumPy arrays. float64, float32 and
float16 are supported, and bfloat16 where ``ml_dtypes`` is installed. Shapes, formulas and errors are those of
:mod:`moda_attn.functional`; gradients are torch's business. ``OMP_NUM_THREADS`` bounds the threads of a call.
"""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from . import _arrays

__all__ = ["duplex_align", "modular_attention", "pseudo_sink"]

Array = NDArray[np.generic]


def _empty(shape: tuple[int, ...], dtype: str) -> Array:
    if dtype == "bfloat16":
        # An array of this dtype exists, so the package that defines it does.
        from ml_dtypes import bfloat16

        return np.empty(shape, bfloat16)
    return np.empty(shape, dtype)


def duplex_align(
    key: Array,
    value: Array,
    modality: Array,
    keep: Array,
    mix: Array,
    *,
    kind: str = "covariance",
    context: Array | None = None,
    basis: Array | None = None,
    eps: float = 1e-6,
) -> tuple[Array, Array]:
    """Aligns the keys of every modality with the bases of the others: :func:`moda_attn.functional.duplex_align`.

    Args:
        key, value: (B, Hkv, Nk, D), one floating dtype.
        modality: (B, Nk), any integer dtype, ids from 0 to M-1; -1 is padding.
        keep, mix: (M, D, D), the key's dtype or float32.
        kind: ``"covariance"`` or ``"gram"``.
        context: (B, Nk) bool, the tokens that may feed a basis; default every token that is not padding.
        basis: (B, Hkv, M, D, D), float32 (float64 for float64 keys), used instead of computing one.
        eps: added to every component of a key before it is normalised.

    Returns:
        The aligned keys (B, Hkv, Nk, D) and the bases (B, Hkv, M, D, D) before row norm.

    Raises:
        ModaTypeError, ModaValueError: as :func:`moda_attn.functional.duplex_align`.
    """
    return _arrays.duplex_align(_empty, key, value, modality, keep, mix, kind, context, basis, eps)


def pseudo_sink(position: Array, query_modality: Array, span: int, decay: Array, base: Array) -> Array:
    """The logarithm of the pseudo-scores' total weight: :func:`moda_attn.functional.pseudo_sink`.

    Args:
        position, query_modality: (B, Nq), any integer dtype.
        span: number of positions that a row is filled up to.
        decay, base: (M, Hq), float32 or float64.

    Returns:
        (B, Hq, Nq) in decay's dtype, -inf for padding and where the span leaves no pseudo-scores.

    Raises:
        ModaTypeError, ModaValueError: as :func:`moda_attn.functional.pseudo_sink`.
    """
    return _arrays.pseudo_sink(_empty, position, query_modality, span, decay, base)


@overload
def modular_attention(
    query: Array,
    key: Array,
    value: Array,
    modality: Array,
    *,
    query_modality: Array | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Array | None = None,
    modality_bias: Array | None = None,
    key_range: Array | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: Literal[False] = False,
) -> Array: ...


@overload
def modular_attention(
    query: Array,
    key: Array,
    value: Array,
    modality: Array,
    *,
    query_modality: Array | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Array | None = None,
    modality_bias: Array | None = None,
    key_range: Array | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: Literal[True, "modality"],
) -> tuple[Array, Array]: ...


def modular_attention(
    query: Array,
    key: Array,
    value: Array,
    modality: Array,
    *,
    query_modality: Array | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Array | None = None,
    modality_bias: Array | None = None,
    key_range: Array | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: bool | Literal["modality"] = False,
) -> Array | tuple[Array, Array]:
    """Attention with pseudo-scores and a bias a pair of modalities: :func:`moda_attn.functional.modular_attention`.

    Args:
        query: (B, Hq, Nq, D); key, value: (B, Hkv, Nk, D), one floating dtype, Hq a multiple of Hkv.
        modality: (B, Nk), any integer dtype; -1 is padding, which is never attended.
        query_modality: (B, Nq); default the last Nq entries of `modality`.
        is_causal: query i sees key j only where ``j <= i + Nk - Nq``.
        scale: factor on q . k, default ``D ** -0.5``.
        sink: (B|1, Hq|1, Nq), for ``"split"`` (B|1, Hq|1, Nq, 2), float32 (float64 for float64 queries).
        modality_bias: (B|1, Hq|1, M, M), the sink's dtype; -inf forbids a pair.
        key_range: (B|1, Nq, 2), any integer dtype: the first key a query may see and one past the last, clamped.
        combine: ``"joint"`` or ``"split"``.
        num_modalities: M, above every id.
        return_mass: also return where the attention went; ``"modality"`` needs `num_modalities` or `modality_bias`.

    Returns:
        (B, Hq, Nq, D) in the query's dtype; with `return_mass` also (B, Hq, Nq, 3): self, cross, pseudo;
        with ``"modality"`` (B, Hq, Nq, M + 1): each modality, pseudo.

    Raises:
        ModaTypeError, ModaValueError: as :func:`moda_attn.functional.modular_attention`.
    """
    options = (query_modality, is_causal, scale, sink, modality_bias, key_range, combine, num_modalities, return_mass)
    return _arrays.modular_attention(_empty, query, key, value, modality, *options)
