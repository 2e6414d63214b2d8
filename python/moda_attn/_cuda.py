"""The CUDA kernels of the registered operators: what their extension needs of torch.

Torch allocates everything, results and workspace, on its current stream, and the launches go to that stream: nothing
here waits for the device. Kernels read vectors of 16 bytes, so rows (the head dimension) must be contiguous, aligned
and a multiple of 8 elements long, and tables without gaps; other tensors are copied, and filled up with zeros, which
changes no result. What forward and backward of an operator both read goes to the extension as one tuple.
"""

from __future__ import annotations

import contextlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _native
from .errors import ModaValueError

__all__ = ["IS_BUILT", "check_cuda", "run"]

#: Whether the extension was built with CUDA kernels.
IS_BUILT = hasattr(_native, "cuda_check")

_STEP = 8  # elements: a row is a multiple of them
_VECTOR = 16  # bytes

#: Releases of torch whose tensors the extension can only take as capsules, which they make on the current device alone.
_ONLY_CAPSULES = getattr(Tensor, "__dlpack_c_exchange_api__", None) is None

Outputs = Callable[..., tuple[Tensor, ...]]


def _look_in_packages() -> None:
    """Tells the extension where Python packages lie: NVIDIA's hold the compiler, usually beside torch."""
    folders = [Path(torch.__file__).parent.parent, Path(sysconfig.get_path("purelib"))]
    _native.cuda_look_in([str(folder) for folder in dict.fromkeys(folders)])


if IS_BUILT:
    _look_in_packages()


def check_cuda(device: torch.device | str | int | None = None) -> None:
    """Raises what kernels on a CUDA device have found and could not raise themselves: a modality id out of range.

    A kernel takes such a token for padding and goes on. The next call of an operator on the device raises the error;
    this function waits for the device first, so it speaks for every call so far.

    Args:
        device: the device, default the current one.

    Raises:
        ModaValueError: an earlier call was given a modality id out of range; the first one is named.
        ModaRuntimeError: the device cannot be used.
    """
    if not IS_BUILT:
        raise ModaValueError("this build of moda_attn has no CUDA kernels; wanted one with the feature cuda")
    index = torch.device("cuda" if device is None else device).index if not isinstance(device, int) else device
    index = torch.cuda.current_device() if index is None else index
    torch.cuda.synchronize(index)
    _native.cuda_check(index)


def run(kernel: Callable[..., Any], outputs: Callable[..., Any], *inputs: Any) -> Any:
    """Calls one of the kernels below, which may be on another device than the current one."""
    with torch.cuda.device_of(inputs[0]) if _ONLY_CAPSULES else contextlib.nullcontext():
        return kernel(outputs, inputs)


def _place(like: Tensor) -> tuple[int, Callable[[int], Tensor]]:
    """The current stream of a tensor's device and what allocates a workspace for it."""
    stream = torch.cuda.current_stream(like.device).cuda_stream
    return stream, lambda count: like.new_empty(count, dtype=torch.uint8)


def _filler(dim: int, **tensors: tuple[Tensor | None, int]) -> Callable[[Tensor, int], Tensor]:
    """What fills the last dimensions of a tensor up with zeros to what kernels read.

    Each tensor comes with the number of its last dimensions that should be `dim`. Where one is not, nothing is filled:
    the extension complains about the shapes as they were given.
    """
    missing = -dim % _STEP
    if missing and all(t is None or t.shape[max(t.dim() - n, 0) :] == (dim,) * n for t, n in tensors.values()):
        return lambda tensor, axes: pad(tensor, (0, missing) * axes)
    return lambda tensor, axes: tensor


def _whole(tensor: Tensor) -> Tensor:
    """The tensor without gaps, where vectors may begin: a copy where it must be, as of a part of a flat parameter."""
    if tensor.is_contiguous() and tensor.data_ptr() % _VECTOR == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with rows that kernels can read: a copy where it must be."""
    if not tensor.is_contiguous() and tensor.data_ptr() % _VECTOR == 0:
        *others, last = tensor.stride()
        step = _VECTOR // tensor.element_size()
        if last == 1 and not any(stride % step for stride in others):
            return tensor
    return _whole(tensor)


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a result that belongs to the tensor before it was filled up."""
    if tensor.shape == like.shape:
        return tensor
    return tensor[tuple(slice(size) for size in like.shape)].contiguous()


def _table(table: Tensor, key: Tensor) -> Tensor:
    """A parameter in the type of the kernels' arithmetic. Other dtypes are left to the extension."""
    known = table.dtype in (key.dtype, torch.float32)
    work = torch.float64 if key.dtype == torch.float64 else torch.float32
    return table.to(work) if known else table


def align(outputs: Outputs, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Kernel of ``duplex_align``; `outputs` makes its results from its arguments."""
    key, value, modality, keep, mix, kind, context, basis, eps = inputs
    wanted, dim = outputs(*inputs), sum(key.shape[-1:])
    fill = _filler(dim, value=(value, 1), keep=(keep, 2), mix=(mix, 2), basis=(basis, 2))
    rows = [_rows(fill(tensor, 1)) for tensor in (key, value)]
    tables = [_whole(fill(_table(table, key), 2)) for table in (keep, mix)]
    given = None if basis is None else _whole(fill(basis, 2))
    prepared = (*rows, modality, *tables, kind, context, given, eps)
    aligned, computed = wanted if rows[0].shape == key.shape else outputs(*prepared)
    _native.cuda_align_forward((*prepared, dim), aligned, computed if basis is None else None, _place(key))
    return _cut(aligned, wanted[0]), _cut(computed, wanted[1])


def align_backward(outputs: Outputs, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Kernel of ``duplex_align_backward``."""
    key, value, modality, keep, mix, kind, context, basis, computed, eps, d_aligned, d_basis = inputs
    wanted, dim = outputs(*inputs), sum(key.shape[-1:])
    fill = _filler(dim, value=(value, 1), keep=(keep, 2), mix=(mix, 2), basis=(basis, 2), d_aligned=(d_aligned, 1))
    rows = [_rows(fill(tensor, 1)) for tensor in (key, value)]
    tables = [_whole(fill(_table(table, key), 2)) for table in (keep, mix)]
    prepared = (*rows, modality, *tables, kind, context, _whole(fill(basis, 2)))
    upstream = (_rows(fill(d_aligned, 1)), None if d_basis is None else _whole(fill(d_basis, 2)))
    made = wanted if rows[0].shape == key.shape else outputs(*prepared, computed, eps, *upstream)
    *others, given = made
    arguments = [(*prepared, eps, dim), computed, *upstream, *others, None if computed else given, _place(key)]
    _native.cuda_align_backward(*arguments)
    return tuple(_cut(tensor, like) for tensor, like in zip(made, wanted, strict=True))


def sink(outputs: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
    """Kernel of ``pseudo_sink``."""
    made = outputs(*inputs)
    _native.cuda_sink_forward(inputs, made, _place(inputs[0]))
    return made


def sink_backward(outputs: Outputs, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Kernel of ``pseudo_sink_backward``."""
    made = outputs(*inputs)
    *problem, d_sink = inputs
    arguments = [tuple(problem), d_sink, *made, _place(inputs[0])]
    _native.cuda_sink_backward(*arguments)
    return made


def _scale(scale: float | None, dim: int) -> float:
    return max(dim, 1) ** -0.5 if scale is None else scale


def attention(outputs: Outputs, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Kernel of ``modular_attention``."""
    query, key, value, modality, query_modality, is_causal, scale, *options = inputs
    wanted, dim = outputs(*inputs), sum(query.shape[-1:])
    combine, mass_by = options[-3], options[-1]
    fill = _filler(dim, key=(key, 1), value=(value, 1))
    rows = [_rows(fill(tensor, 1)) for tensor in (query, key, value)]
    prepared = (*rows, modality, query_modality, is_causal, _scale(scale, dim), *options)
    made = wanted if rows[0].shape == query.shape else outputs(*prepared)
    out, logsumexp, parts, mass = made
    optional = (parts if combine == "split" else None, None if mass_by == "none" else mass)
    _native.cuda_attend_forward(prepared[:-1], mass_by, out, logsumexp, *optional, _place(query))
    return tuple(_cut(tensor, like) for tensor, like in zip(made, wanted, strict=True))


def attention_backward(outputs: Outputs, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Kernel of ``modular_attention_backward``."""
    *problem, d_out, out, logsumexp, parts, needs_sink, needs_bias = inputs
    query, key, value, modality, query_modality, is_causal, scale, *options = problem
    wanted, dim = outputs(*inputs), sum(query.shape[-1:])
    split = options[-1] == "split"
    fill = _filler(dim, key=(key, 1), value=(value, 1), d_out=(d_out, 1), out=(out, 1))
    rows = [_rows(fill(tensor, 1)) for tensor in (query, key, value)]
    prepared = (*rows, modality, query_modality, is_causal, _scale(scale, dim), *options)
    both = _whole(fill(parts, 1)) if split else parts
    upstream = (_rows(fill(d_out, 1)), _whole(fill(out, 1)), _whole(logsumexp), both)
    made = wanted if rows[0].shape == query.shape else outputs(*prepared, *upstream, needs_sink, needs_bias)
    d_query, d_key, d_value, d_sink, d_bias = made
    optional = (d_sink if needs_sink else None, d_bias if needs_bias else None)
    given = (*upstream[:3], both if split else None)
    # The number of modalities is that of the bias table, or does not matter.
    _native.cuda_attend_backward((*prepared, None), *given, d_query, d_key, d_value, *optional, _place(query))
    return tuple(_cut(tensor, like) for tensor, like in zip(made, wanted, strict=True))
