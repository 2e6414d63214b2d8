"""Registered operators as Python calls them: arguments checked, autocast applied, and no detour through the dispatcher.

For an operator that is defined in Python torch's dispatcher takes as long as a short kernel, with gradients several
times that. Where it would do nothing but call the CPU kernel, the kernel is called here. Whatever listens to operators
or changes what they mean still has them dispatched: compilation, tracing, profilers, modes, functorch, autocast,
tensors that are not plain numbers in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled

from . import _cuda, _transforms
from .errors import ModaTypeError, ModaValueError

#: Types of the devices that this build has kernels for.
DEVICES = ("cpu", "cuda") if _cuda.IS_BUILT else ("cpu",)

# Types whose tensors are plain unless they say otherwise, and those of the arguments that a kernel takes, by the type
# in the schema. What is of another type the dispatcher converts, or refuses in its own words.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_TYPES = {
    "Tensor": _TENSORS,
    "Optional[Tensor]": _TENSORS | {type(None)},
    "bool": {bool},
    "str": {str},
    "int": {int},
    "Optional[int]": {int, type(None)},
    "float": {float, int},
    "Optional[float]": {float, int, type(None)},
}


class Operator:
    """An operator that calls its CPU kernel itself where that is all there is to do.

    Args:
        schema: the arguments, by position.
        dispatched: the operator as torch knows it.
        kernel: its CPU kernel.
        differentiable: what is called in its place where a gradient may be asked for.
        cast: names of the arguments that autocast casts.
    """

    def __init__(
        self,
        schema: torch.FunctionSchema,
        dispatched: Callable[..., Any],
        kernel: Callable[..., Any],
        differentiable: Callable[..., Any],
        cast: Sequence[str] = (),
    ) -> None:
        arguments = [(argument.name, str(argument.type)) for argument in schema.arguments]
        self._dispatched, self._kernel, self._differentiable = dispatched, kernel, differentiable
        self._types = [_TYPES[kind] for _, kind in arguments]
        self._tensors = [(at, name, kind != "Tensor") for at, (name, kind) in enumerate(arguments) if "Tensor" in kind]
        self._cast = [at for at, (name, _) in enumerate(arguments) if name in cast]

    def __call__(self, *inputs: Any) -> Any:
        """Runs the operator.

        Raises:
            ModaTypeError: an argument that must be a tensor is none.
            ModaValueError: tensors on different devices, or on one without kernels.
            ModaError: whatever else the extension finds.
        """
        if not self._is_plain(inputs):
            self._check(inputs)
            return self._dispatched(*self._under_autocast(inputs))
        graph = torch.is_grad_enabled() and any(type(each) in _TENSORS and each.requires_grad for each in inputs)
        try:
            return self._differentiable(*inputs) if graph else self._kernel(*inputs)
        except Exception:
            # Whoever words the complaint must not depend on the way that a call takes; and some tensors whose memory a
            # kernel cannot read are made readable by the dispatcher.
            return self._dispatched(*inputs)

    def _is_plain(self, inputs: Sequence[Any]) -> bool:
        """Whether nobody is to see the call or to change it, and every tensor is plain numbers in memory."""
        if (
            torch.compiler.is_compiling()
            or _len_torch_function_stack()
            or _len_torch_dispatch_stack()
            or _transforms.are_active()
            or _is_any_autocast_enabled()
            or _profiler_enabled()
            or _get_tracing_state() is not None
        ):
            return False
        for given, types in zip(inputs, self._types, strict=True):
            kind = type(given)
            # Memory knows nothing of a pending negation.
            if kind not in types or (kind in _TENSORS and (not given.is_cpu or given.is_neg())):
                return False
        return True

    def _check(self, inputs: Sequence[Any]) -> None:
        """Raises unless all tensors are some, on one device that has kernels; the rest is checked by the extension."""
        first, device = "", None
        for at, name, optional in self._tensors:
            given = inputs[at]
            if optional and given is None:
                continue
            if not isinstance(given, Tensor):
                raise ModaTypeError(f"{name} is a {type(given).__name__}; wanted a torch.Tensor")
            if device is None:
                first, device = name, given.device
                # Fake and meta tensors have shapes and no data: they reach the shape functions, never a kernel.
                if device.type not in (*DEVICES, "meta"):
                    wanted = f"{' or '.join(DEVICES)}: this build has no kernels for others"
                    raise ModaValueError(f"{name} is on device {device}; wanted {wanted}")
            elif given.device != device:
                raise ModaValueError(f"{name} is on device {given.device}; wanted {device}, the device of {first}")

    def _under_autocast(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The arguments in the autocast dtype, where it is on; float64 stays, as it does for torch's operators."""
        device = inputs[0].device.type
        if not self._cast or device not in DEVICES or not torch.is_autocast_enabled(device):
            return inputs
        dtype = torch.get_autocast_dtype(device)

        def casts(at: int, given: Any) -> bool:
            return at in self._cast and given.is_floating_point() and given.dtype != torch.float64

        return [given.to(dtype) if casts(at, given) else given for at, given in enumerate(inputs)]


def differentiable(
    name: str, kernel: Callable[..., Any], setup: Callable[..., None], formula: Callable[..., Any]
) -> Callable[..., Any]:
    """A kernel with its gradient, as the dispatcher has it.

    Forward takes the context itself: what transforms want instead costs as much as the dispatcher.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        results = kernel(*inputs)
        setup(ctx, inputs, results)
        return results

    parts = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    function: Any = type(name, (torch.autograd.Function,), parts)
    return function.apply
