"""What the operators write into: results of every operator, allocated by torch beside its inputs.

Each function takes the arguments of its operator as they come. Where a result was not asked for it gives None; shapes
are composed so that no input makes them fail: the extension's complaint about it comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._mass import MassBy, columns

Result: TypeAlias = Tensor | None


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an operator on tensors of `dtype` computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def align(
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    keep: Tensor,
    mix: Tensor,
    kind: str,
    context: Tensor | None,
    basis: Tensor | None,
    eps: float,
) -> tuple[Tensor, Result]:
    """Aligned keys, and the bases where none is given."""
    if basis is not None:
        return _like(key), None
    return _like(key), key.new_empty((*key.shape[:2], *keep.shape), dtype=arithmetic(key.dtype))


def align_gradients(
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    keep: Tensor,
    mix: Tensor,
    kind: str,
    context: Tensor | None,
    basis: Tensor,
    computed: bool,
    eps: float,
    d_aligned: Tensor,
    d_basis: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Result]:
    """Those of key, value, keep and mix, and of a given basis."""
    work = arithmetic(key.dtype)
    return _like(key), _like(value), _like(keep, work), _like(mix, work), None if computed else _like(basis)


def sink(position: Tensor, query_modality: Tensor, span: int, decay: Tensor, base: Tensor) -> Tensor:
    """The sink logits."""
    return decay.new_empty((*position.shape[:1], *decay.shape[1:2], *position.shape[1:2]))


def sink_gradients(
    position: Tensor, query_modality: Tensor, span: int, decay: Tensor, base: Tensor, d_sink: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of decay and base."""
    return _like(decay), _like(base)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    query_modality: Tensor | None,
    is_causal: bool,
    scale: float | None,
    sink: Tensor | None,
    modality_bias: Tensor | None,
    key_range: Tensor | None,
    combine: str,
    num_modalities: int | None,
    mass_by: MassBy,
    *,
    for_backward: bool = True,
) -> tuple[Tensor, Result, Result, Result]:
    """The output, what backward needs beside it (logsumexp, the two parts of "split"), and the mass."""
    logsumexp = parts = mass = None
    if for_backward:
        shape, work, split = query.shape, arithmetic(query.dtype), combine == "split"
        logsumexp = query.new_empty((*shape[:2], 2 if split else 1, *shape[2:3]), dtype=work)
        parts = query.new_empty((*shape[:2], 2, *shape[2:]), dtype=work) if split else None
    if mass_by != "none":
        table = None if modality_bias is None else modality_bias.shape
        size = (*query.shape[:3], columns(mass_by, num_modalities, table))
        mass = query.new_empty(size, dtype=arithmetic(query.dtype))
    return _like(query), logsumexp, parts, mass


def attention_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    query_modality: Tensor | None,
    is_causal: bool,
    scale: float | None,
    sink: Tensor | None,
    modality_bias: Tensor | None,
    key_range: Tensor | None,
    combine: str,
    d_out: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    parts: Tensor | None,
    needs_sink: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Result, Result]:
    """Those of query, key and value, and where they are wanted of sink and bias, in full size."""
    work = arithmetic(query.dtype)
    d_sink = d_bias = None
    if needs_sink:
        # The softmaxes of a row come last here, in front in the logsumexp.
        d_sink = query.new_empty((*query.shape[:3], *logsumexp.shape[2:3]), dtype=work)
    if needs_bias and modality_bias is not None:
        d_bias = query.new_empty((*query.shape[:2], *modality_bias.shape[2:]), dtype=work)
    return _like(query), _like(key), _like(value), d_sink, d_bias


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with all its results, as schemas want them, which know no optional ones.

    An empty tensor stands for each that was not asked for.
    """

    @wraps(function)
    def run(*inputs: Any) -> Any:
        results, like = function(*inputs), inputs[0]
        if isinstance(results, Tensor):
            return results
        return tuple(like.new_empty(0, dtype=arithmetic(like.dtype)) if each is None else each for each in results)

    return run
