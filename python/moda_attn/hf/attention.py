"""Patching one attention module: a subclass of its own class whose forward passes through the seam."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..errors import ModaRuntimeError, ModaValueError
from ..layer import ModaLayer
from .derived import derived
from .names import NAME
from .seam import CacheSeam

if TYPE_CHECKING:
    from .._typing import PatchedAttention
    from .runtime import Runtime


def refuse_foreign_forward(attention: nn.Module) -> None:
    """Raise where another patch gave `attention` a forward of its own: it would hide ours, or ours it.

    Raises:
        ModaValueError: a forward on the instance that is not accelerate's, or one on the class that does not come from
            the module that defines the class.
    """
    cls = type(attention)
    _drop_restored_forward(attention)
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    origin = inspect.unwrap(vars(owner)["forward"]).__module__
    if "forward" in vars(attention) and not hasattr(attention, "_hf_hook") and not _is_the_class_forward(attention):
        what = "a forward of its own on the instance"
    elif origin != owner.__module__:
        what = f"a forward from {origin}"
    else:
        return
    raise ModaValueError(
        f"{cls.__name__} has {what} (another patch, such as Unsloth's); moda-attn cannot be applied on top of it"
    )


def refuse_unsupported(attention: nn.Module) -> None:
    """Raise where our kernel could not compute what `attention` does.

    Raises:
        ModaValueError: it caps its scores, or has attention sinks of its own.
    """
    for name, what in (("attn_logit_softcapping", "a soft cap on its scores"), ("sinks", "attention sinks of its own")):
        if getattr(attention, name, None) is not None:
            raise ModaValueError(
                f'{type(attention).__name__} has {what} ({name}), which attention "{NAME}" does not compute; a '
                'configuration that only aligns keys can keep the model\'s own: mask="none", location_prior=False'
            )


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
    from .interface import register  # what it registers with, transformers 4.37 does not have

    register()  # also in a process that only unpickles a patched model

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
            call.entered.layers.add(self.layer_idx)
            seam = CacheSeam(self.moda, call, past_key_values)
            output = super().forward(hidden_states, *args, past_key_values=seam, moda_seam=seam, **kwargs)
            if seam.state is None or (implementation == NAME and not seam.attended):
                raise ModaRuntimeError(
                    f"the forward of {cls.__name__} {_past_the_patch(seam)}: another patch replaced it (Unsloth's, for "
                    "instance), and MODA would silently not run"
                )
            return output

    return derived(patched_class, Patched)


def _past_the_patch(seam: CacheSeam) -> str:
    return "never updated its cache" if seam.state is None else f'did not call the attention function "{NAME}"'


def _is_the_class_forward(attention: nn.Module) -> bool:
    """Whether the forward on the instance is the one of its class, bound: so transformers 4 leaves it behind after a
    call with `output_attentions`. It would outlive a change of the class."""
    return getattr(vars(attention)["forward"], "__func__", None) is type(attention).forward


def _take_hook(attention: nn.Module) -> Any:
    """Take accelerate's hook off: it stores a `forward` on the instance, which would shadow the class."""
    _drop_restored_forward(attention)
    if "forward" not in vars(attention):
        return None
    if _is_the_class_forward(attention):
        del vars(attention)["forward"]
        return None
    from accelerate.hooks import remove_hook_from_module

    hook = attention._hf_hook
    remove_hook_from_module(attention)
    vars(attention).pop("forward", None)
    return hook


def _drop_restored_forward(attention: nn.Module) -> None:
    """Take off the class's own forward where it was put on the instance, as transformers 4 leaves it there after a call
    with `output_attentions`: it would outlive a change of class."""
    forward = vars(attention).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is type(attention).forward:
        del attention.forward


def _give_hook(attention: nn.Module, hook: Any) -> None:
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(attention, hook)
