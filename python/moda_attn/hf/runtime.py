"""What a patched model shares between its hooks and its layers."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..config import TEXT, ModaConfig
from ..errors import ModaRuntimeError, ModaValueError
from .ids import OWN_ARGUMENTS, describe_call, past_length, refuse_late_images
from .registry import Family, MediaTokens
from .structure import Structure

if TYPE_CHECKING:
    from .._typing import VisionLanguageModel
    from .record import MassRecorder


@dataclass
class Runtime:
    """One per patched model; every patched attention holds a reference to it.

    Attributes:
        structure: where the model keeps its text attention.
        family: the model's row in the registry.
        config: None where the model is only watched, not changed.
        tokens: the placeholders of image and video features.
        attention: name of the attention implementation before the patch.
        recorder: receives the attention mass of every layer while set.
        prompt_length: number of prompt columns while the model generates.
        prompt_modality: (B, N), the modality ids that `generate` was given for them.
    """

    structure: Structure
    family: Family
    config: ModaConfig | None
    tokens: MediaTokens
    attention: str
    recorder: MassRecorder | None = None
    prompt_length: int | None = None
    prompt_modality: Tensor | None = None
    handles: list[Any] = field(default_factory=list)

    def connect(self, model: nn.Module) -> None:
        """Hook the model and its core, and stand before `generate`. Bound methods: a deep copy gets its own."""
        owners = [model.get_submodule(path) for path in self.structure.owners]
        for module in owners:
            self.handles.append(module.register_forward_pre_hook(self.before_forward, with_kwargs=True))
        self.handles.append(owners[-1].register_forward_hook(self.after_forward, with_kwargs=True))
        if hasattr(model, "generate"):
            vars(model)["generate"] = functools.partial(self.generate, model)

    def disconnect(self, model: nn.Module) -> None:
        """Undo :meth:`connect`."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        vars(model).pop("generate", None)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Add what the layers must know about the tokens to the keyword arguments; the outermost module does it."""
        if kwargs.get("moda_call") is not None:
            return None
        signature = inspect.signature(module.forward)
        own = {name: kwargs[name] for name in OWN_ARGUMENTS if name in kwargs}
        # Some families take mm_token_type_ids themselves.
        kwargs = {name: value for name, value in kwargs.items() if name not in own or name in signature.parameters}
        arguments = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs, **own}
        if self.prompt_modality is not None:
            arguments["modality_ids"] = _of_this_call(self.prompt_modality, arguments)
        if self.config is not None and self.config.needs_basis:
            refuse_late_images(arguments)
        call = describe_call(
            arguments,
            self.tokens,
            context="all" if self.config is None else self.config.context,
            training=module.training and torch.is_grad_enabled(),
            prompt_length=self.prompt_length,
        )
        kwargs["moda_call"] = call
        first = self.family.first_position
        if first is not None and self.config is not None:
            positions = _positions(arguments, call.modality.shape[1])
            if positions is not None:
                kwargs["position_ids"] = positions + first
        return args, kwargs

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Raise when a layer was passed by: a wrapper that hides the patched class would be a silent no-op."""
        call = kwargs["moda_call"]
        missed = sorted(set(self.structure.layers) - call.entered)
        if missed:
            raise ModaRuntimeError(f"patched layers {missed} were not entered; another patch hides them")
        missed = sorted(call.entered - call.aligned)
        if missed:
            raise ModaRuntimeError(
                f"layers {missed} never called past_key_values.update with their keys, so nothing was aligned; "
                "leave them out of config.layers"
            )

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
        # transformers refuses arguments that the model's own forward does not name; the hook puts the ids back.
        taken = inspect.signature(llava.forward).parameters
        own = [kwargs.pop(name) for name in OWN_ARGUMENTS[:2] if name in kwargs and name not in taken]
        self.prompt_modality = next((ids for ids in own if ids is not None), None)
        self.prompt_length = prompt.shape[1] if isinstance(prompt, Tensor) else None
        try:
            return type(llava).generate(llava, *args, **kwargs)
        finally:
            self.prompt_length = self.prompt_modality = None


def _of_this_call(prompt: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The modality ids (B, n) of one forward call inside `generate`: the prompt's, then text."""
    new = arguments.get("input_ids")
    new = arguments["inputs_embeds"] if new is None else new
    start = int(past_length(arguments.get("past_key_values")))
    rows, count = new.shape[0], new.shape[1]
    if rows % prompt.shape[0]:
        raise ModaValueError(f"modality_ids has {prompt.shape[0]} rows for a batch of {rows}")
    # Beams and several samples of one prompt are neighbours.
    prompt = prompt.repeat_interleave(rows // prompt.shape[0], dim=0).to(new.device)
    text = prompt.new_full((rows, max(start + count - prompt.shape[1], 0)), TEXT)
    return torch.cat([prompt, text], dim=1)[:, start : start + count]


def _positions(arguments: dict[str, Any], count: int) -> Tensor | None:
    """Position ids (B, n) that count only real tokens, where the call has a 2-D mask and brings none of its own.

    Alignment acts on rotated keys: with positions that count padding, a row's result would depend on how far padding
    shifts it.
    """
    mask = arguments.get("attention_mask")
    if arguments.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
