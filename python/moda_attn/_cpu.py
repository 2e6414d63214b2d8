"""The CPU kernels of the registered operators: results allocated, then filled by the extension.

A kernel takes the arguments of its operator as they come and gives the operator's results, None for those that were not
asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native, _results
from ._results import Result


def align(*inputs: Any, for_backward: bool = True) -> tuple[Tensor, Result]:
    """Kernel of ``duplex_align``; a backward needs nothing beside its results."""
    results = _results.align(*inputs)
    arguments = [*inputs, *results, torch.get_num_threads()]
    _native.align_forward(*arguments)
    return results


def align_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Result]:
    """Kernel of ``duplex_align_backward``."""
    gradients = _results.align_gradients(*inputs)
    arguments = [*inputs, *gradients, torch.get_num_threads()]
    _native.align_backward(*arguments)
    return gradients


def sink(*inputs: Any, for_backward: bool = True) -> Tensor:
    """Kernel of ``pseudo_sink``; a backward needs nothing beside its inputs."""
    result = _results.sink(*inputs)
    arguments = [*inputs, result]
    _native.sink_forward(*arguments)
    return result


def sink_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Kernel of ``pseudo_sink_backward``."""
    gradients = _results.sink_gradients(*inputs)
    arguments = [*inputs, *gradients]
    _native.sink_backward(*arguments)
    return gradients


def attention(*inputs: Any, for_backward: bool = True) -> tuple[Tensor, Result, Result, Result]:
    """Kernel of ``modular_attention``; what only a backward needs is made `for_backward` alone."""
    results = _results.attention(*inputs, for_backward=for_backward)
    arguments = [*inputs, *results, torch.get_num_threads()]
    _native.attend_forward(*arguments)
    return results


def attention_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Result, Result]:
    """Kernel of ``modular_attention_backward``."""
    gradients = _results.attention_gradients(*inputs)
    *given, _, _ = inputs  # the last two say which gradients are wanted
    arguments = [*given, *gradients, torch.get_num_threads()]
    _native.attend_backward(*arguments)
    return gradients
