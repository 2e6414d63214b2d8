"""The forward operators on arrays of any library: what :mod:`moda_attn.numpy` and :mod:`moda_attn.dlpack` share.

Inputs are anything the extension can read: NumPy arrays and every object that speaks DLPack, on the CPU. Results are
made by the caller's ``empty(shape, dtype name)`` and filled in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from . import _native
from ._mass import columns, mass_by
from .errors import ModaTypeError

Array = TypeVar("Array")
Empty = Callable[[tuple[int, ...], str], Array]


def threads() -> int:
    """Threads a call may use: OMP_NUM_THREADS where it is set to a number, else every processor of this process."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    if wish.isdecimal() and int(wish) > 0:
        return int(wish)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _arithmetic(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _floating(dtype: str) -> str:
    """The dtype a result is made in; any one does for an input that the extension will refuse."""
    return dtype if dtype in ("float64", "float32", "float16", "bfloat16") else "float32"


def duplex_align(
    empty: Empty[Array],
    key: Any,
    value: Any,
    modality: Any,
    keep: Any,
    mix: Any,
    kind: str,
    context: Any,
    basis: Any,
    eps: float,
) -> tuple[Array, Array]:
    """Aligned keys and bases; a given basis is returned as it is."""
    shape, dtype, _ = _native.describe("key", key)
    tables, _, _ = _native.describe("keep", keep)
    aligned = empty(shape, _floating(dtype))
    computed = empty((*shape[:2], *tables), _arithmetic(dtype)) if basis is None else None
    inputs = (key, value, modality, keep, mix, kind, context, basis, eps)
    _native.align_forward(*inputs, aligned, computed, threads())
    return aligned, basis if computed is None else computed


def pseudo_sink(empty: Empty[Array], position: Any, query_modality: Any, span: int, decay: Any, base: Any) -> Array:
    """The sink logits."""
    if isinstance(span, bool) or not isinstance(span, int):
        raise ModaTypeError(f"span is a {type(span).__name__}; wanted an int")
    (rows, _, _), (heads, dtype, _) = _native.describe("position", position), _native.describe("decay", decay)
    sink = empty((*rows[:1], *heads[1:2], *rows[1:2]), _floating(dtype))
    _native.sink_forward(position, query_modality, span, decay, base, sink)
    return sink


def modular_attention(
    empty: Empty[Array],
    query: Any,
    key: Any,
    value: Any,
    modality: Any,
    query_modality: Any,
    is_causal: bool,
    scale: float | None,
    sink: Any,
    modality_bias: Any,
    key_range: Any,
    combine: str,
    num_modalities: int | None,
    return_mass: bool | Literal["modality"],
) -> Array | tuple[Array, Array]:
    """The output and, on request, the attention mass."""
    shape, dtype, _ = _native.describe("query", query)
    out = empty(shape, _floating(dtype))
    by, mass = mass_by(return_mass, num_modalities, has_table=modality_bias is not None), None
    if by != "none":
        table = None if modality_bias is None else _native.describe("modality_bias", modality_bias)[0]
        mass = empty((*shape[:3], columns(by, num_modalities, table)), _arithmetic(dtype))
    options = (is_causal, scale, sink, modality_bias, key_range, combine, num_modalities, by)
    inputs = (query, key, value, modality, query_modality, *options)
    _native.attend_forward(*inputs, out, None, None, mass, threads())
    return out if mass is None else (out, mass)
