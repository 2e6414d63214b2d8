"""The registered operators ``torch.ops.moda_attn.*``: schema, kernels for CPU and CUDA, fake kernel, autograd formula.

Each public operator has a backward operator beside it, registered too, so that ``torch.compile`` can put both into its
graphs. Results are allocated by torch (``_results``) and filled in place by the extension, which reads every input
where it lies. :mod:`moda_attn.functional` is the way in.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _cpu, _cuda, _results
from ._operator import Operator, differentiable
from ._transforms import transformable
from .errors import ModaRuntimeError

__all__ = ["duplex_align", "modular_attention", "pseudo_sink"]

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
        " Tensor logsumexp, Tensor? parts, bool needs_sink, bool needs_bias)"
        " -> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_sink, Tensor d_bias)"
    ),
}

for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=_TAGS)


# Derivatives: what forward saves, and the formula.


def _align_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
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
    d_key, d_value, d_keep, d_mix, d_given = _align_backward(
        key, value, modality, keep, mix, kind, context, basis, computed, eps, d_aligned, d_basis
    )
    d_keep, d_mix = d_keep.to(keep.dtype), d_mix.to(mix.dtype)
    return d_key, d_value, None, d_keep, d_mix, None, None, None if computed else d_given, None


def _sink_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    position, query_modality, span, decay, base = inputs
    ctx.save_for_backward(position, query_modality, decay, base)
    ctx.span = span


def _sink_formula(ctx: Any, d_sink: Tensor) -> tuple[Tensor | None, ...]:
    position, query_modality, decay, base = ctx.saved_tensors
    inputs = (position, query_modality, ctx.span, decay, base, d_sink)
    d_decay, d_base = _sink_backward(*inputs)
    return None, None, None, d_decay, d_base


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    query, key, value, modality, query_modality, is_causal, scale, sink, modality_bias, key_range, combine, *_ = inputs
    out, *others = output
    ctx.mark_non_differentiable(*(each for each in others if each is not None))
    logsumexp, parts, _ = others
    parts = parts if combine == "split" else None
    saved = (query, key, value, modality, query_modality, sink, modality_bias, key_range, out, logsumexp, parts)
    ctx.save_for_backward(*saved)
    ctx.options = is_causal, scale, combine
    ctx.set_materialize_grads(False)


def _attention_formula(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 13
    query, key, value, modality, query_modality, sink, modality_bias, key_range, *upstream = ctx.saved_tensors
    is_causal, scale, combine = ctx.options
    needs_sink, needs_bias = ctx.needs_input_grad[7], ctx.needs_input_grad[8]
    inputs = (query, key, value, modality, query_modality, is_causal, scale, sink, modality_bias, key_range, combine)
    gradients = _attention_backward(*inputs, d_out, *upstream, needs_sink, needs_bias)
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


def _register(name: str, kernel: Any, cuda: Any, results: Any, derivative: Any = None, cast: Any = ()) -> Operator:
    """Registers an operator whose results are made by `results`; `derivative` is what forward saves and the formula."""
    results = _results.whole(results)
    setup, formula = derivative or (None, _refuse_double_backward)
    _LIBRARY.impl(name, _results.whole(kernel), "CPU")
    if _cuda.IS_BUILT:
        _LIBRARY.impl(name, partial(_cuda.run, cuda, results), "CUDA")
    torch.library.register_fake(f"moda_attn::{name}", results, lib=_LIBRARY)
    torch.library.register_autograd(f"moda_attn::{name}", formula, setup_context=setup, lib=_LIBRARY)
    registered = getattr(torch.ops.moda_attn, name).default
    dispatched = transformable(name, registered, setup, formula)
    if derivative is None:
        return Operator(registered._schema, dispatched, kernel, dispatched)
    without, graph = partial(kernel, for_backward=False), differentiable(name, kernel, *derivative)
    return Operator(registered._schema, dispatched, without, graph, cast)


_align_backward = _register(
    "duplex_align_backward", _cpu.align_backward, _cuda.align_backward, _results.align_gradients
)
_sink_backward = _register("pseudo_sink_backward", _cpu.sink_backward, _cuda.sink_backward, _results.sink_gradients)
_attention_backward = _register(
    "modular_attention_backward", _cpu.attention_backward, _cuda.attention_backward, _results.attention_gradients
)

duplex_align = _register(
    "duplex_align",
    _cpu.align,
    _cuda.align,
    _results.align,
    derivative=(_align_setup, _align_formula),
    cast=("key", "value"),
)
pseudo_sink = _register("pseudo_sink", _cpu.sink, _cuda.sink, _results.sink, derivative=(_sink_setup, _sink_formula))
modular_attention = _register(
    "modular_attention",
    _cpu.attention,
    _cuda.attention,
    _results.attention,
    derivative=(_attention_setup, _attention_formula),
    cast=("query", "key", "value"),
)
