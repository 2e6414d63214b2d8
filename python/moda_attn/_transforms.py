"""Operators inside torch.func's transforms and forward-mode differentiation.

What torch.library makes of an operator's gradient cannot be transformed, and lets a forward-mode derivative vanish
without a word. There the operator runs as an `autograd.Function` of the same formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from .errors import ModaRuntimeError


def are_active() -> bool:
    """Whether a transform or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transformable(name: str, operator: Callable, setup: Callable | None, formula: Callable) -> Callable:
    """`operator`, and inside transforms its equal that they know how to handle.

    Args:
        name: for messages.
        operator: takes and returns what its schema says, all by position.
        setup, formula: its gradient, as `torch.library.register_autograd` takes them.
    """

    def refuse_forward_mode(ctx: Any, *_: Any) -> NoReturn:
        raise ModaRuntimeError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, linearize; forward_ad): use "
            "torch.func.grad, vjp or jacrev, or moda_attn.reference"
        )

    parts = {
        "generate_vmap_rule": True,
        "forward": staticmethod(operator),
        "setup_context": staticmethod(setup or _nothing),
        "backward": staticmethod(formula),
        "jvp": staticmethod(refuse_forward_mode),
    }
    function: Any = type(name, (torch.autograd.Function,), parts)

    def call(*inputs: Any) -> Any:
        return function.apply(*inputs) if are_active() else operator(*inputs)

    return call


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of an operator whose gradient needs nothing."""
