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
from .ids import OWN_ARGUMENTS, describe_call, from_processor, new_columns, refuse_late_images
from .memory import is_filled
from .prompt import PerThread, Prompt
from .registry import Family, MediaTokens
from .structure import Structure
from .wrappers import refuse_cut_gradient, refuse_lost_parameters

if TYPE_CHECKING:
    from .._typing import VisionLanguageModel
    from .record import Recorder


#: Entry points of continuous batching; every other one of transformers goes through these.
REFUSED = ("init_continuous_batching", "continuous_batching_context_manager", "generate_batch")


@dataclass
class Runtime:
    """One per patched model; every patched attention holds a reference to it.

    Attributes:
        structure: where the model keeps its text attention.
        family: the model's row in the registry.
        config: None where the model is only watched, not changed.
        tokens: the placeholders of image and video features.
        attention: name of the attention implementation before the patch.
        recorder: computes the attention of every layer while set, and records it.
        own: of the calling thread alone: the prompt of its running `generate`.
    """

    structure: Structure
    family: Family
    config: ModaConfig | None
    tokens: MediaTokens
    attention: str
    recorder: Recorder | None = None
    own: PerThread = field(default_factory=PerThread)
    handles: list[Any] = field(default_factory=list)

    def connect(self, model: nn.Module) -> None:
        """Hook the model and its core, and stand before `generate`. Bound methods: a deep copy gets its own."""
        owners = [model.get_submodule(path) for path in self.structure.owners]
        for module in owners:
            hook = functools.partial(self.before_forward, _positional(module))
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self.handles.append(owners[-1].register_forward_hook(self.after_forward, with_kwargs=True))
        if hasattr(model, "generate"):
            vars(model)["generate"] = functools.partial(self.generate, model)
        if self.config is not None and hasattr(model, "save_pretrained"):
            from .io import save_beside

            vars(model)["save_pretrained"] = functools.partial(save_beside, model)
        for name in REFUSED:
            if hasattr(model, name):
                vars(model)[name] = functools.partial(refuse_continuous_batching, name)

    def disconnect(self, model: nn.Module) -> None:
        """Undo :meth:`connect`."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for name in ("generate", "save_pretrained", *REFUSED):
            vars(model).pop(name, None)

    def before_forward(
        self, names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """Add what the layers must know about the tokens to the keyword arguments; the outermost module does it.

        `names` are those of the module's positional arguments, read beforehand: torch.compile cannot read a signature.
        """
        if kwargs.get("moda_call") is not None:
            return None
        training = module.training and torch.is_grad_enabled()
        if training and vars(module).get("moda_runtime") is self and not torch.compiler.is_compiling():
            self._refuse_lost_parameters(module)
        own = {name: kwargs[name] for name in OWN_ARGUMENTS if name in kwargs}
        # Some families take mm_token_type_ids themselves.
        kwargs = {name: value for name, value in kwargs.items() if name not in own or name in names}
        arguments = {**dict(zip(names, args, strict=False)), **kwargs, **own}
        filled = is_filled(arguments.get("past_key_values"))
        if self.config is not None and self.config.needs_basis and filled:
            refuse_late_images(arguments)
        prompt = None if filled else self.own.prompt
        if prompt is not None:
            arguments |= prompt.describe(arguments)
        call = describe_call(
            arguments,
            self.tokens,
            context="all" if self.config is None else self.config.context,
            training=training,
            prompt_length=None if prompt is None else prompt.length,
        )
        wanted = arguments.get("output_attentions")
        call.weights = bool(getattr(module.config, "output_attentions", False) if wanted is None else wanted)
        kwargs["moda_call"] = call
        first = self.family.first_position
        if first is not None and self.config is not None:
            positions = _positions(arguments, call.modality.shape[1])
            if positions is not None:
                kwargs["position_ids"] = positions + first
        return args, kwargs

    def _refuse_lost_parameters(self, model: nn.Module) -> None:
        from .patch import moda_layers

        refuse_lost_parameters(model, moda_layers(model).values())

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Raise when a layer was passed by, now or in the backward to come: that would be a silent no-op."""
        missed = sorted(set(self.structure.layers) - kwargs["moda_call"].entered.layers)
        if missed:
            raise ModaRuntimeError(f"patched layers {missed} were not entered; another patch hides them")
        if module.training and torch.is_grad_enabled():
            refuse_cut_gradient(module, output[0])

    def generate(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with the length of the prompt known: only the prompt may feed a basis."""
        vision_language = cast("VisionLanguageModel", model)
        settings = kwargs.get("generation_config") or vision_language.generation_config
        chunked = kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None)
        if chunked and self.config is not None and self.config.needs_basis:
            raise ModaValueError("prefill_chunk_size is not supported: the bases need the whole prompt in one call")
        kinds = None if "mm_token_type_ids" in _positional(model) else kwargs.pop("mm_token_type_ids", None)
        if kinds is not None:
            kwargs.setdefault("modality_ids", from_processor(kinds, self.tokens))
        prompt = Prompt.take(args, kwargs)
        if is_filled(kwargs.get("past_key_values")) and (prompt.modality_ids, prompt.context) != (None, None):
            raise ModaValueError("modality_ids and moda_context describe a prompt; past_key_values holds one already")
        with self.own.generating(prompt):
            return type(vision_language).generate(vision_language, *args, **kwargs)


def _positional(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a module's forward takes by position."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


def refuse_continuous_batching(name: str, *_: Any, **__: Any) -> None:
    """Stands before the entry points of continuous batching.

    Raises:
        ModaValueError: always. Its rows share one paged sequence and its prompts come in pieces, where bases and
            positions are a row's own and need the whole prompt.
    """
    raise ModaValueError(
        f"{name} is not supported on a patched model: continuous batching cuts prompts into pieces and packs them into "
        "one row, the bases need whole prompts; use generate with a padded batch"
    )


def _positions(arguments: dict[str, Any], count: int) -> Tensor | None:
    """Position ids (B, n) that count only real tokens, where the call has a 2-D mask and brings none of its own.

    Alignment acts on rotated keys: with positions that count padding, a row's result would depend on how far padding
    shifts it.
    """
    mask = arguments.get("attention_mask")
    if arguments.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return new_columns((mask.long().cumsum(-1) - 1).clamp(min=0), arguments.get("past_key_values"), count)
