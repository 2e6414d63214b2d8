"""Wrappers around a patched model that must know its MODA parameters: PEFT, DistributedDataParallel, FSDP."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ModaRuntimeError, ModaValueError
from ..layer import ModaLayer
from .placement import is_sharded

#: Under which the first FSDP (`FullyShardedDataParallel`, torch's `fully_shard` is the second) keeps what it wraps.
FSDP1_INNER = "_fsdp_wrapped_module"


def in_fsdp1(module: nn.Module) -> bool:
    """Whether `module` is a wrapper of the first FSDP; told by its part, so that FSDP need not be imported."""
    return FSDP1_INNER in dict(module.named_children())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside what DistributedDataParallel, the first FSDP and PEFT put around it."""
    inner: Any = model
    while isinstance(inner, DistributedDataParallel) or in_fsdp1(inner):
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "peft_config") else inner


def refuse_lost_parameters(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """Raise in a training step that would leave MODA's parameters behind, in silence.

    Args:
        model: the patched model.
        layers: its MODA layers, as they hang in the model.

    Raises:
        ModaRuntimeError: PEFT froze them and would not save them, or DistributedDataParallel was there before them and
            would let each rank train its own.
    """
    if hasattr(model, "peft_config") and not all(hasattr(layer, "modules_to_save") for layer in layers):
        raise ModaRuntimeError(
            "PEFT neither trains nor saves MODA's parameters here: wrap the patched model with "
            'modules_to_save=["moda"] in the adapter\'s configuration'
        )
    # None outside of a DDP forward, and where DDP leaves gradients to another reducer.
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None:
        return
    known = {id(parameter) for parameter in wrapper._module_parameters}
    if any(id(parameter) not in known for layer in layers for parameter in layer.parameters()):
        raise ModaRuntimeError(
            "DistributedDataParallel does not know MODA's parameters, which would differ from rank to rank: apply "
            "first, then wrap"
        )


def refuse_cut_gradient(core: nn.Module, hidden: Tensor) -> None:
    """Raise after the forward of a training step whose backward would pass MODA's parameters by.

    A reentrant checkpoint keeps no graph where its inputs need no gradient, which is so for the first layer of a frozen
    model, and then for all.

    Args:
        core: the module that ran, in training mode with gradients enabled.
        hidden: its last hidden states.

    Raises:
        ModaRuntimeError: the states need no gradient, though MODA's parameters do.
    """
    if hidden.requires_grad:
        return
    layers = (module for module in core.modules() if isinstance(module, ModaLayer))
    if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
        raise ModaRuntimeError(
            "no gradient would reach MODA's parameters: with reentrant gradient checkpointing on a frozen model call "
            "model.enable_input_require_grads(), or use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def refuse_removal(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """Raise where a wrapper holds parameters that `remove` would take away.

    Raises:
        ModaValueError: PEFT or FSDP holds them.
    """
    if hasattr(model, "peft_config"):
        raise ModaValueError("PEFT holds MODA's parameters: merge or unload its adapter first")
    if any(is_sharded(parameter) for layer in layers for parameter in layer.parameters()):
        raise ModaValueError("FSDP holds MODA's parameters: save them, and load them into a model that is not sharded")
