"""What a patched model shares between its hooks and its layers."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..config import ModaConfig
from ..errors import ModaRuntimeError, ModaValueError
from .ids import OWN_ARGUMENTS, describe_call, refuse_late_images
from .registry import Family

if TYPE_CHECKING:
    from .._typing import VisionLanguageModel
    from .record import MassRecorder


@dataclass
class Runtime:
    """One per patched model; every patched attention holds a reference to it.

    Attributes:
        family: the model's row in the registry.
        config: None where the model is only watched, not changed.
        image_token: id of the image placeholder.
        layers: number of layers of the text decoder.
        attention: name of the attention implementation before the patch.
        recorder: receives the attention mass of every layer while set.
        prompt_length: number of prompt columns while the model generates.
    """

    family: Family
    config: ModaConfig | None
    image_token: int
    layers: int
    attention: str
    recorder: MassRecorder | None = None
    prompt_length: int | None = None
    handles: list[Any] = field(default_factory=list)

    def connect(self, model: nn.Module) -> None:
        """Hook the model and its core, and stand before `generate`. Bound methods: a deep copy gets its own."""
        core = model.get_submodule(self.family.core)
        for module in dict.fromkeys((model, core)):
            self.handles.append(module.register_forward_pre_hook(self.before_forward, with_kwargs=True))
        self.handles.append(core.register_forward_hook(self.after_forward, with_kwargs=True))
        vars(model)["generate"] = functools.partial(self.generate, model)
        if self.config is not None:
            from .io import save_beside

            vars(model)["save_pretrained"] = functools.partial(save_beside, model)

    def disconnect(self, model: nn.Module) -> None:
        """Undo :meth:`connect`."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        del model.generate
        vars(model).pop("save_pretrained", None)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Add what the layers must know about the tokens to the keyword arguments; the outermost module does it."""
        if kwargs.get("moda_call") is not None:
            return None
        own = {name: kwargs[name] for name in OWN_ARGUMENTS if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        arguments = {**inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments, **kwargs, **own}
        if self.config is not None and self.config.needs_basis:
            refuse_late_images(arguments)
        call = describe_call(
            arguments,
            self.image_token,
            context="all" if self.config is None else self.config.context,
            training=module.training and torch.is_grad_enabled(),
            prompt_length=self.prompt_length,
        )
        kwargs["moda_call"] = call
        positions = _positions(arguments, call.modality.shape[1])
        if positions is not None and self.config is not None:
            kwargs["position_ids"] = positions
        return args, kwargs

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Raise when a layer was passed by: a wrapper that hides the patched class would be a silent no-op."""
        missed = sorted(set(range(self.layers)) - kwargs["moda_call"].entered.layers)
        if missed:
            raise ModaRuntimeError(f"patched layers {missed} were not entered; another patch hides them")

    def generate(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with the length of the prompt known: only the prompt may feed a basis."""
        llava = cast("VisionLanguageModel", model)
        settings = kwargs.get("generation_config") or llava.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise ModaValueError("prefill_chunk_size is not supported: the bases need the whole prompt in one call")
        prompt = (
            args[0]
            if args
            else next(
                (kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(name) is not None),
                None,
            )
        )
        self.prompt_length = prompt.shape[1] if isinstance(prompt, Tensor) else None
        try:
            return type(llava).generate(llava, *args, **kwargs)
        finally:
            self.prompt_length = None


def _positions(arguments: dict[str, Any], count: int) -> Tensor | None:
    """Position ids (B, n) that count only real tokens, where the call has a 2-D mask and brings none of its own.

    Alignment acts on rotated keys: with positions that count padding, a row's result would depend on how far padding
    shifts it.
    """
    mask = arguments.get("attention_mask")
    if arguments.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
