"""Where the weights of a module really are: on its device, offloaded by accelerate, sharded by FSDP, copied by PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ModaValueError
from ..layer import ModaLayer


def home_of(projection: nn.Linear) -> torch.device:
    """The device on which a projection computes, where parameters that work with it belong.

    Raises:
        ModaValueError: weights that were never loaded, or are sharded.
    """
    weight = projection.weight
    if is_sharded(weight):
        raise ModaValueError(
            "the model's weights are sharded: parameters that come now would be trained by each rank alone; apply "
            "first, then fully_shard"
        )
    if not weight.is_meta:
        return weight.device
    if not _is_offloaded(projection):
        raise ModaValueError("the model's weights are on the meta device: load them first, then apply")
    device: Any = _offloading_hook(projection).execution_device
    return torch.device(device)


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP keeps only a part of `tensor` on this rank."""
    return hasattr(tensor, "full_tensor")


def trained_copy(layer: nn.Module) -> ModaLayer:
    """The layer itself; where PEFT holds it in ``modules_to_save``, the active adapter's copy."""
    copies = getattr(layer, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return cast(ModaLayer, layer)
    active = cast("list[str]", layer.active_adapters)
    return cast(ModaLayer, copies[active[0]] if active else layer.original_module)


def read(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter of `module` by name, whole, on the CPU. With sharded parameters all ranks must call it."""
    values = {}
    for prefix, part in module.named_modules():
        with _brought_back(part):
            for name, parameter in part.named_parameters(prefix, recurse=False):
                tensor = parameter.detach()
                whole = cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor
                # A copy: what was brought back goes away again.
                values[name] = torch.empty_like(whole, device="cpu").copy_(whole).contiguous()
    return values


@torch.no_grad()
def write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set every parameter of `module`, in its own dtype and place. With sharded parameters all ranks must call it.

    Raises:
        ModaValueError: parameters that accelerate has offloaded.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ModaValueError("the patched model is offloaded: load the weights first, then offload it")
        value = values[name].to(parameter.dtype)
        if is_sharded(parameter):
            from torch.distributed.tensor import distribute_tensor

            sharded = cast(Any, parameter)
            value = distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
        parameter.copy_(value)


def _offloading_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)), None)


def _is_offloaded(module: nn.Module) -> bool:
    return _offloading_hook(module) is not None


def _brought_back(part: nn.Module) -> Any:
    """A context in which the offloaded parameters that `part` itself has are there."""
    if not any(parameter.is_meta for parameter in part.parameters(recurse=False)):
        return nullcontext()
    if not _is_offloaded(part):
        raise ModaValueError("parameters on the meta device, and no hook of accelerate's to bring them back")
    from accelerate.utils import align_module_device

    return align_module_device(part, torch.device("cpu"))
