"""The registered operators ``torch.ops.moda_attn.*``: schema, kernels for CPU and CUDA, fake kernel, autograd formula.

Each public operator has a backward operator beside it, registered too, so that ``torch.compile`` can put both into its
graphs. Results are allocated here, by torch, and filled in place by the extension, which reads every input where it
lies. :mod:`moda_attn.functional` is the way in: it checks what a schema cannot and adds autocast.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _cuda, _native
from ._mass import MassBy, columns
from ._transforms import transformable
from .errors import ModaRuntimeError

__all__ = ["DEVICES", "duplex_align", "modular_attention", "pseudo_sink"]

#: Types of the devices that this build has kernels for.
DEVICES = ("cpu", "cuda") if _cuda.IS_BUILT else ("cpu",)

_LIBRARY = torch.library.Library("moda_attn", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_SCHEMAS = {
    "duplex_align": (
        "(Tensor key, Tensor value, Tensor modality, Tensor keep, Tensor mix, str kind, Tensor? context, Tensor? basis,"
        " float eps) -> (Tensor aligned, Tensor basis)"
    ),
    "duplex_align_backward": (
        "(Tensor key, Tensor value, Tensor modality, Tensor keep, Tensor mix, str kind, Tensor? context, Tensor basis,"
        " bool computed, float eps, Tensor d_aligned, Tensor? d_basis)"
        " -> (Tensor d_key, Tensor d_value, Tensor d_keep, Tensor d_mix, Tensor d_basis_given)"
    ),
    "pseudo_sink": "(Tensor position, Tensor query_modality, SymInt span, Tensor decay, Tensor base) -> Tensor",
    "pseudo_sink_backward": (
        "(Tensor position, Tensor query_modality, SymInt span, Tensor decay, Tensor base, Tensor d_sink)"
        " -> (Tensor d_decay, Tensor d_base)"
    ),
    "modular_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor modality, Tensor? query_modality, bool is_causal,"
        " float? scale, Tensor? sink, Tensor? modality_bias, Tensor? key_range, str combine,"
        " SymInt? num_modalities, str mass_by)"
        " -> (Tensor out, Tensor logsumexp, Tensor parts, Tensor mass)"
    ),
    "modular_attention_backward": (
        "(Tensor query, Tensor key, Tensor value, Tensor modality, Tensor? query_modality, bool is_causal,"
        " float? scale, Tensor? sink, Tensor? modality_bias, Tensor? key_range, str combine, Tensor d_out, Tensor out,"
        " Tensor logsumexp, Tensor parts, bool needs_sink, bool needs_bias)"
        " -> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_sink, Tensor d_bias)"
    ),
}

for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=_TAGS)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an operator on tensors of `dtype` computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _absent(like: Tensor) -> Tensor:
    """What stands for a result that was not asked for: schemas have no optional results."""
    return like.new_empty(0, dtype=_arithmetic(like.dtype))


# Duplex alignment. Here and below a kernel takes its schema's arguments as they come and hands them on; the function
# that makes the results is the fake kernel too. Shapes are composed so that no input makes them fail: the extension's
# complaint comes first.


def _align_outputs(
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    keep: Tensor,
    mix: Tensor,
    kind: str,
    context: Tensor | None,
    basis: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if basis is not None:
        return key.new_empty(key.shape), _absent(key)
    shape = (*key.shape[:2], *keep.shape)
    return key.new_empty(key.shape), key.new_empty(shape, dtype=_arithmetic(key.dtype))


def _align(*inputs: Any) -> tuple[Tensor, Tensor]:
    aligned, computed = _align_outputs(*inputs)
    basis = inputs[7]
    arguments = [*inputs, aligned, computed if basis is None else None, torch.get_num_threads()]
    _native.align_forward(*arguments)
    return aligned, computed


def _align_gradients(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = _arithmetic(key.dtype)
    given = _absent(key) if computed else basis.new_empty(basis.shape)
    d_keep, d_mix = keep.new_empty(keep.shape, dtype=work), mix.new_empty(mix.shape, dtype=work)
    return key.new_empty(key.shape), value.new_empty(value.shape), d_keep, d_mix, given


def _align_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _align_gradients(*inputs)
    *others, given = gradients
    computed = inputs[8]
    arguments = [*inputs, *others, None if computed else given, torch.get_num_threads()]
    _native.align_backward(*arguments)
    return gradients


def _align_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    key, value, modality, keep, mix, kind, context, basis, eps = inputs
    used = output[1] if basis is None else basis
    ctx.save_for_backward(key, value, modality, keep, mix, context, used)
    ctx.options = kind, basis is None, eps
    ctx.set_materialize_grads(False)


def _align_formula(ctx: Any, d_aligned: Tensor | None, d_basis: Tensor | None) -> tuple[Tensor | None, ...]:
    key, value, modality, keep, mix, context, basis = ctx.saved_tensors
    kind, computed, eps = ctx.options
    if not computed:
        d_basis = None
    if d_aligned is None:
        if d_basis is None:
            return (None,) * 9
        d_aligned = torch.zeros_like(key)
    d_key, d_value, d_keep, d_mix, d_given = _duplex_align_backward(
        key, value, modality, keep, mix, kind, context, basis, computed, eps, d_aligned, d_basis
    )
    d_keep, d_mix = d_keep.to(keep.dtype), d_mix.to(mix.dtype)
    return d_key, d_value, None, d_keep, d_mix, None, None, None if computed else d_given, None


# Pseudo-scores.


def _sink_outputs(position: Tensor, query_modality: Tensor, span: int, decay: Tensor, base: Tensor) -> Tensor:
    return decay.new_empty((*position.shape[:1], *decay.shape[1:2], *position.shape[1:2]))


def _sink(*inputs: Any) -> Tensor:
    sink = _sink_outputs(*inputs)
    arguments = [*inputs, sink]
    _native.sink_forward(*arguments)
    return sink


def _sink_gradients(
    position: Tensor, query_modality: Tensor, span: int, decay: Tensor, base: Tensor, d_sink: Tensor
) -> tuple[Tensor, Tensor]:
    return decay.new_empty(decay.shape), base.new_empty(base.shape)


def _sink_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    gradients = _sink_gradients(*inputs)
    arguments = [*inputs, *gradients]
    _native.sink_backward(*arguments)
    return gradients


def _sink_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    position, query_modality, span, decay, base = inputs
    ctx.save_for_backward(position, query_modality, decay, base)
    ctx.span = span


def _sink_formula(ctx: Any, d_sink: Tensor) -> tuple[Tensor | None, ...]:
    position, query_modality, decay, base = ctx.saved_tensors
    inputs = (position, query_modality, ctx.span, decay, base, d_sink)
    d_decay, d_base = _pseudo_sink_backward(*inputs)
    return None, None, None, d_decay, d_base


# Modular attention.


def _attention_outputs(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, work = query.shape, _arithmetic(query.dtype)
    split = combine == "split"
    mass = _absent(query)
    if mass_by != "none":
        table = None if modality_bias is None else modality_bias.shape
        mass = query.new_empty((*shape[:3], columns(mass_by, num_modalities, table)), dtype=work)
    return (
        query.new_empty(shape),
        query.new_empty((*shape[:2], 2 if split else 1, *shape[2:3]), dtype=work),
        query.new_empty((*shape[:2], 2, *shape[2:]), dtype=work) if split else _absent(query),
        mass,
    )


def _attention(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _attention_outputs(*inputs)
    out, logsumexp, parts, mass = outputs
    combine, mass_by = inputs[-3], inputs[-1]
    wanted = (parts if combine == "split" else None, None if mass_by == "none" else mass)
    arguments = [*inputs, out, logsumexp, *wanted, torch.get_num_threads()]
    _native.attend_forward(*arguments)
    return outputs


def _attention_gradients(
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
    parts: Tensor,
    needs_sink: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = _arithmetic(query.dtype)
    d_sink, d_bias = _absent(query), _absent(query)
    if needs_sink:
        # The softmaxes of a row come last here, in front in the logsumexp.
        d_sink = query.new_empty((*query.shape[:3], *logsumexp.shape[2:3]), dtype=work)
    if needs_bias and modality_bias is not None:
        d_bias = query.new_empty((*query.shape[:2], *modality_bias.shape[2:]), dtype=work)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), d_sink, d_bias


def _attention_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _attention_gradients(*inputs)
    d_query, d_key, d_value, d_sink, d_bias = gradients
    *problem, d_out, out, logsumexp, parts, needs_sink, needs_bias = inputs
    given = (d_out, out, logsumexp, parts if problem[-1] == "split" else None)
    wanted = (d_sink if needs_sink else None, d_bias if needs_bias else None)
    arguments = [*problem, *given, d_query, d_key, d_value, *wanted, torch.get_num_threads()]
    _native.attend_backward(*arguments)
    return gradients


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    query, key, value, modality, query_modality, is_causal, scale, sink, modality_bias, key_range, combine, *_ = inputs
    out, logsumexp, parts, mass = output
    saved = (query, key, value, modality, query_modality, sink, modality_bias, key_range, out, logsumexp, parts)
    ctx.save_for_backward(*saved)
    ctx.options = is_causal, scale, combine
    ctx.mark_non_differentiable(logsumexp, parts, mass)
    ctx.set_materialize_grads(False)


def _attention_formula(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 13
    query, key, value, modality, query_modality, sink, modality_bias, key_range, *upstream = ctx.saved_tensors
    is_causal, scale, combine = ctx.options
    needs_sink, needs_bias = ctx.needs_input_grad[7], ctx.needs_input_grad[8]
    inputs = (query, key, value, modality, query_modality, is_causal, scale, sink, modality_bias, key_range, combine)
    gradients = _modular_attention_backward(*inputs, d_out, *upstream, needs_sink, needs_bias)
    d_query, d_key, d_value, d_sink, d_bias = gradients
    if needs_sink and combine != "split":
        d_sink = d_sink.squeeze(-1)
    d_sink = d_sink.sum_to_size(sink.shape) if needs_sink else None
    d_bias = d_bias.sum_to_size(modality_bias.shape) if needs_bias else None
    return d_query, d_key, d_value, None, None, None, None, d_sink, d_bias, None, None, None, None


# Registration.


def _refuse_double_backward(ctx: Any, *_: Any) -> NoReturn:
    raise ModaRuntimeError(
        "moda_attn gives first derivatives only: a double backward went through one of its operators; call backward"
        " without create_graph=True, or use moda_attn.reference, which is differentiable to any order"
    )


def _register(
    name: str, kernel: Any, cuda: Any, fake: Any, setup: Any = None, formula: Any = _refuse_double_backward
) -> Any:
    _LIBRARY.impl(name, kernel, "CPU")
    if _cuda.IS_BUILT:
        _LIBRARY.impl(name, partial(_cuda.run, cuda, fake), "CUDA")
    torch.library.register_fake(f"moda_attn::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"moda_attn::{name}", formula, setup_context=setup, lib=_LIBRARY)
    return transformable(name, getattr(torch.ops.moda_attn, name).default, setup, formula)


_duplex_align_backward = _register("duplex_align_backward", _align_backward, _cuda.align_backward, _align_gradients)
_pseudo_sink_backward = _register("pseudo_sink_backward", _sink_backward, _cuda.sink_backward, _sink_gradients)
_modular_attention_backward = _register(
    "modular_attention_backward", _attention_backward, _cuda.attention_backward, _attention_gradients
)

duplex_align = _register("duplex_align", _align, _cuda.align, _align_outputs, _align_setup, _align_formula)
pseudo_sink = _register("pseudo_sink", _sink, _cuda.sink, _sink_outputs, _sink_setup, _sink_formula)
modular_attention = _register(
    "modular_attention", _attention, _cuda.attention, _attention_outputs, _attention_setup, _attention_formula
)
