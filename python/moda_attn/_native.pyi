"""The Rust extension. Private: :mod:`moda_attn.functional`, :mod:`moda_attn.numpy` and :mod:`moda_attn.dlpack` call it.

Tensors are any CPU tensors: torch (by the C exchange API of DLPack), NumPy, or by ``__dlpack__``. What is written must
be a fresh, contiguous tensor of exactly the right shape and dtype. The GIL is released while a kernel runs.

Functions named ``cuda_`` are there where the extension was built with CUDA kernels. They take tensors of one CUDA
device and `place`: the handle of a stream of it, and a function that allocates a tensor of so many bytes for it.
"""

from collections.abc import Callable
from typing import Any, final

__all__ = [
    "Tensor",
    "_allocate_for_test",
    "_panic_for_test",
    "_product_rate",
    "align_backward",
    "align_forward",
    "attend_backward",
    "attend_forward",
    "build_info",
    "cuda_align_backward",
    "cuda_align_forward",
    "cuda_attend_backward",
    "cuda_attend_forward",
    "cuda_check",
    "cuda_info",
    "cuda_look_in",
    "cuda_sink_backward",
    "cuda_sink_forward",
    "describe",
    "explain",
    "list_errors",
    "sink_backward",
    "sink_forward",
]

_Tensor = Any
_Place = tuple[int, Callable[[int], Any]]
# key, value, modality, keep, mix, kind, context, basis, eps, dim
_AlignInputs = tuple[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor, str, _Tensor | None, _Tensor | None, float, int]
# position, query_modality, span, decay, base
_SinkInputs = tuple[_Tensor, _Tensor, int, _Tensor, _Tensor]
# query, key, value, modality, query_modality, is_causal, scale, sink, bias, key_range, combine, num_modalities
_AttendInputs = tuple[
    _Tensor,
    _Tensor,
    _Tensor,
    _Tensor,
    _Tensor | None,
    bool,
    float,
    _Tensor | None,
    _Tensor | None,
    _Tensor | None,
    str,
    int | None,
]

def align_forward(
    key: _Tensor,
    value: _Tensor,
    modality: _Tensor,
    keep: _Tensor,
    mix: _Tensor,
    kind: str,
    context: _Tensor | None,
    basis: _Tensor | None,
    eps: float,
    aligned: _Tensor,
    basis_out: _Tensor | None,
    threads: int,
) -> None: ...
def align_backward(
    key: _Tensor,
    value: _Tensor,
    modality: _Tensor,
    keep: _Tensor,
    mix: _Tensor,
    kind: str,
    context: _Tensor | None,
    basis: _Tensor,
    computed: bool,
    eps: float,
    d_aligned: _Tensor,
    d_basis: _Tensor | None,
    d_key: _Tensor,
    d_value: _Tensor,
    d_keep: _Tensor,
    d_mix: _Tensor,
    d_basis_given: _Tensor | None,
    threads: int,
) -> None: ...
def sink_forward(
    position: _Tensor, query_modality: _Tensor, span: int, decay: _Tensor, base: _Tensor, sink: _Tensor
) -> None: ...
def sink_backward(
    position: _Tensor,
    query_modality: _Tensor,
    span: int,
    decay: _Tensor,
    base: _Tensor,
    d_sink: _Tensor,
    d_decay: _Tensor,
    d_base: _Tensor,
) -> None: ...
def attend_forward(
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    modality: _Tensor,
    query_modality: _Tensor | None,
    is_causal: bool,
    scale: float | None,
    sink: _Tensor | None,
    bias: _Tensor | None,
    key_range: _Tensor | None,
    combine: str,
    num_modalities: int | None,
    mass_by: str,
    out: _Tensor,
    lse: _Tensor | None,
    parts: _Tensor | None,
    mass: _Tensor | None,
    threads: int,
) -> None: ...
def attend_backward(
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    modality: _Tensor,
    query_modality: _Tensor | None,
    is_causal: bool,
    scale: float | None,
    sink: _Tensor | None,
    bias: _Tensor | None,
    key_range: _Tensor | None,
    combine: str,
    d_out: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    parts: _Tensor | None,
    d_query: _Tensor,
    d_key: _Tensor,
    d_value: _Tensor,
    d_sink: _Tensor | None,
    d_bias: _Tensor | None,
    threads: int,
) -> None: ...
def cuda_align_forward(inputs: _AlignInputs, aligned: _Tensor, basis_out: _Tensor | None, place: _Place) -> None: ...
def cuda_align_backward(
    inputs: _AlignInputs,
    computed: bool,
    d_aligned: _Tensor,
    d_basis: _Tensor | None,
    d_key: _Tensor,
    d_value: _Tensor,
    d_keep: _Tensor,
    d_mix: _Tensor,
    d_basis_given: _Tensor | None,
    place: _Place,
) -> None: ...
def cuda_sink_forward(inputs: _SinkInputs, sink: _Tensor, place: _Place) -> None: ...
def cuda_sink_backward(
    inputs: _SinkInputs, d_sink: _Tensor, d_decay: _Tensor, d_base: _Tensor, place: _Place
) -> None: ...
def cuda_attend_forward(
    inputs: _AttendInputs,
    mass_by: str,
    out: _Tensor,
    lse: _Tensor,
    parts: _Tensor | None,
    mass: _Tensor | None,
    place: _Place,
) -> None: ...
def cuda_attend_backward(
    inputs: _AttendInputs,
    d_out: _Tensor,
    out: _Tensor,
    lse: _Tensor,
    parts: _Tensor | None,
    d_query: _Tensor,
    d_key: _Tensor,
    d_value: _Tensor,
    d_sink: _Tensor | None,
    d_bias: _Tensor | None,
    place: _Place,
) -> None: ...
def cuda_check(ordinal: int) -> None: ...
def cuda_info() -> dict[str, Any]: ...
def cuda_look_in(site_packages: list[str]) -> None: ...
def describe(argument: str, tensor: _Tensor) -> tuple[tuple[int, ...], str, int]: ...
def build_info() -> dict[str, Any]: ...
def explain() -> str: ...
def list_errors() -> list[dict[str, str]]: ...
def _product_rate(dtype: str, threads: int, seconds: float) -> float: ...
def _panic_for_test(message: str) -> None: ...
def _allocate_for_test(bytes: int) -> None: ...

@final
class Tensor:
    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: str) -> Tensor: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def _holders(self) -> int: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
