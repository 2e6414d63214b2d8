"""The three operators on any array library that speaks DLPack (JAX, CuPy on the host, ...), forward only.

Inputs are CPU arrays of any library and may be mixed; nothing is copied. Results are
:class:`moda_attn._native.Tensor`: memory that ``jax.numpy.from_dlpack``, ``torch.from_dlpack`` or ``numpy.from_dlpack``
takes over without a copy. float64, float32, bfloat16 and float16 are supported. Shapes, formulas and errors are those
of :mod:`moda_attn.functional`. ``OMP_NUM_THREADS`` bounds the threads of a call.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from . import _arrays
from ._native import Tensor

__all__ = ["Tensor", "duplex_align", "modular_attention", "pseudo_sink"]


def duplex_align(
    key: Any,
    value: Any,
    modality: Any,
    keep: Any,
    mix: Any,
    *,
    kind: str = "covariance",
    context: Any | None = None,
    basis: Any | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Any]:
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
    return _arrays.duplex_align(Tensor.zeros, key, value, modality, keep, mix, kind, context, basis, eps)


def pseudo_sink(position: Any, query_modality: Any, span: int, decay: Any, base: Any) -> Tensor:
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
    return _arrays.pseudo_sink(Tensor.zeros, position, query_modality, span, decay, base)


@overload
def modular_attention(
    query: Any,
    key: Any,
    value: Any,
    modality: Any,
    *,
    query_modality: Any | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Any | None = None,
    modality_bias: Any | None = None,
    key_range: Any | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: Literal[False] = False,
) -> Tensor: ...


@overload
def modular_attention(
    query: Any,
    key: Any,
    value: Any,
    modality: Any,
    *,
    query_modality: Any | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Any | None = None,
    modality_bias: Any | None = None,
    key_range: Any | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: Literal[True, "modality"],
) -> tuple[Tensor, Tensor]: ...


def modular_attention(
    query: Any,
    key: Any,
    value: Any,
    modality: Any,
    *,
    query_modality: Any | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    sink: Any | None = None,
    modality_bias: Any | None = None,
    key_range: Any | None = None,
    combine: str = "joint",
    num_modalities: int | None = None,
    return_mass: bool | Literal["modality"] = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
    return _arrays.modular_attention(Tensor.zeros, query, key, value, modality, *options)
