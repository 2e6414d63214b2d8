"""Patching one attention module: a subclass of its own class whose forward passes through the seam."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..errors import ModaRuntimeError, ModaValueError
from ..layer import ModaLayer
from .names import NAME
from .seam import CacheSeam

if TYPE_CHECKING:
    from .._typing import PatchedAttention
    from .runtime import Runtime


def patch_attention(
    attention: nn.Module, layer: ModaLayer | None, runtime: Runtime, subclass: Callable[[type], type]
) -> None:
    """Swap the class of `attention` for its `subclass`.

    Its parameters keep their names, new ones go into the submodule `moda`.
    """
    hook = _take_hook(attention)
    cls: type = type(attention)
    attention.__class__ = subclass(cls)
    patched = cast("PatchedAttention", attention)
    patched.moda_runtime = runtime
    patched.moda = layer
    _give_hook(patched, hook)


def unpatch_attention(attention: nn.Module) -> None:
    """Undo :func:`patch_attention`."""
    hook = _take_hook(attention)
    attention.__class__ = type(attention).__bases__[0]
    del attention.moda, attention.moda_runtime
    _give_hook(attention, hook)


@functools.cache
def patched_class(cls: type) -> type:
    """A subclass of `cls` whose forward passes through the seam."""

    class Patched(cls):
        def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            call = kwargs.get("moda_call")
            if call is None:
                raise ModaRuntimeError(
                    "a patched attention was called without modality ids: call the model or its core, not the decoder"
                )
            config, implementation = self.moda_runtime.config, self.config._attn_implementation
            if config is not None and config.changes_attention and implementation != NAME:
                raise ModaRuntimeError(
                    f"the attention implementation was set to {implementation!r} after the patch, which would drop the "
                    f'modular mask; set it back to "{NAME}", or call moda_attn.remove'
                )
            call.entered.add(self.layer_idx)
            seam = CacheSeam(self.moda, call, past_key_values)
            return super().forward(hidden_states, *args, past_key_values=seam, moda_seam=seam, **kwargs)

    Patched.__name__ = f"Moda{cls.__name__}"
    Patched.__qualname__ = Patched.__name__
    return Patched


def _take_hook(attention: nn.Module) -> Any:
    """Take accelerate's hook off: it stores a `forward` on the instance, which would shadow the class."""
    if "forward" not in vars(attention):
        return None
    hook = getattr(attention, "_hf_hook", None)
    if hook is None:
        raise ModaValueError(
            f"{type(attention).__name__} has a forward of its own on the instance (another patch, such as Unsloth's); "
            "moda-attn cannot be applied on top of it"
        )
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(attention)
    vars(attention).pop("forward", None)
    return hook


def _give_hook(attention: nn.Module, hook: Any) -> None:
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(attention, hook)
