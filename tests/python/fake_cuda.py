"""CUDA without a GPU: a driver that notes every call and runs nothing, and tensors that say they are on its device.

For processes that the tests start: a process sees one driver. :data:`DRIVER` names the fake one, :data:`LOG` its notes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DRIVER, LOG = "MODA_ATTN_TEST_DRIVER", "FAKE_CUDA_LOG"
STREAM = 0x5EED

if DRIVER in os.environ:
    ctypes.CDLL(os.environ[DRIVER])


class OnCuda(Tensor):
    """A host tensor whose capsules say that it is on a CUDA device."""

    __dlpack_c_exchange_api__ = None
    ordinal = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.ordinal)

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None) -> Any:
        assert stream == -1, f"asked to synchronise with stream {stream}"
        assert max_version is not None
        capsule = self.as_subclass(Tensor).detach().__dlpack__(max_version=max_version)
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        # DLManagedTensorVersioned: version, context, deleter, flags (8 bytes each), then data and the device.
        device = (ctypes.c_int32 * 2).from_address(get(capsule, b"dltensor_versioned") + 40)
        assert device[0] == 1
        device[:] = self.__dlpack_device__()
        return capsule


class OnSecond(OnCuda):
    """The same on another device."""

    ordinal = 1


def on_cuda(value: Any) -> Any:
    """The value, a tensor disguised."""
    return value.as_subclass(OnCuda) if isinstance(value, Tensor) else value


def call(name: str, *inputs: Any) -> Any:
    """Runs the CUDA kernel of an operator on disguised inputs; :data:`allocated` gets the sizes of workspaces."""
    from moda_attn import _cuda, _results

    kernel, results = {
        "duplex_align": (_cuda.align, _results.align),
        "duplex_align_backward": (_cuda.align_backward, _results.align_gradients),
        "pseudo_sink": (_cuda.sink, _results.sink),
        "pseudo_sink_backward": (_cuda.sink_backward, _results.sink_gradients),
        "modular_attention": (_cuda.attention, _results.attention),
        "modular_attention_backward": (_cuda.attention_backward, _results.attention_gradients),
    }[name]
    _cuda._place = _place
    return kernel(_results.whole(results), tuple(on_cuda(value) for value in inputs))


allocated: list[int] = []


def _place(like: Tensor) -> tuple[int, Callable[[int], Tensor]]:
    def allocate(count: int) -> Tensor:
        allocated.append(count)
        # Memory of torch's CPU allocator is aligned to 64 bytes only.
        whole = torch.empty(count + 256, dtype=torch.uint8)
        return whole[-whole.data_ptr() % 256 :][:count].as_subclass(OnCuda)

    return STREAM, allocate


def launches() -> list[str]:
    """Launches since the last call, in order."""
    log = Path(os.environ[LOG])
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return [line for line in lines if line.startswith("cuLaunchKernel")]
