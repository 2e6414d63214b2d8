"""Where a model keeps its text attention: found by what its code does, so that no list of class names is needed."""

from __future__ import annotations

import dis
import functools
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..errors import ModaTypeError, ModaValueError

if TYPE_CHECKING:
    from .._typing import TextAttention, VisionLanguageModel

#: What an attention module must do for its keys to be aligned: the seam.
SEAM = (
    "an attention whose forward takes past_key_values, rotates its keys, and then calls "
    "past_key_values.update(key, value, layer_idx)"
)


@dataclass(frozen=True)
class Structure:
    """The text decoder inside a model.

    Attributes:
        decoder: path from the model to the text decoder; "" where it is the model itself.
        stack: name of the list of the decoder's layers.
        attention: name of the self-attention in a layer.
        layers: indices of the layers that can be patched.
        skipped: index of every other layer -> why not.
        owners: paths of the models that see the tokens before the decoder does, the outermost first.
        text_config: name of the decoder's part of the model's configuration; None where there is no such part.
    """

    decoder: str
    stack: str
    attention: str
    layers: tuple[int, ...]
    skipped: dict[int, str] = field(default_factory=dict)
    owners: tuple[str, ...] = ("",)
    text_config: str | None = None

    def stack_of(self, model: nn.Module) -> nn.ModuleList:
        """The decoder's layers."""
        return cast(nn.ModuleList, model.get_submodule(f"{self.decoder}.{self.stack}".lstrip(".")))

    def attentions(self, model: nn.Module) -> dict[int, TextAttention]:
        """The attention module of every layer that can be patched, by index."""
        stack = self.stack_of(model)
        return {index: cast("TextAttention", getattr(stack[index], self.attention)) for index in self.layers}

    def others(self, model: nn.Module) -> list[Any]:
        """The modules of the layers that cannot be patched that read the decoder's configuration when they attend."""
        stack = self.stack_of(model)
        found = [module for index in self.skipped for module in stack[index].modules()]
        kind = type(self.decoder_of(model).config)
        return [module for module in found if type(getattr(module, "config", None)) is kind]

    def decoder_of(self, model: nn.Module) -> nn.Module:
        """The text decoder."""
        return model.get_submodule(self.decoder)

    def set_attention(self, model: nn.Module, name: str) -> None:
        """Have the text decoder, and it alone, use the attention implementation `name`."""
        part = self.text_config
        cast("VisionLanguageModel", model).set_attn_implementation(name if part is None else {part: name})


def _takes_keywords(module: nn.Module) -> bool:
    kinds = (parameter.kind for parameter in inspect.signature(module.forward).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def find_structure(model: object) -> Structure:
    """Look for the one stack of layers with the seam.

    Raises:
        ModaTypeError: not a module.
        ModaValueError: no such stack, more than one, or a model wrapped by PEFT.
    """
    if not isinstance(model, nn.Module):
        raise ModaTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "peft_config"):
        raise ModaValueError(
            "the model is wrapped by PEFT, which would not save MODA weights: apply first, then wrap it with "
            'modules_to_save=["moda"]'
        )
    from .legacy.structure import legacy_structure  # whose class derives from ours

    legacy = legacy_structure(model)
    if legacy is not None:
        return legacy
    name = type(model).__name__
    for child in model.children():
        if isinstance(child, PreTrainedModel) and not isinstance(model, PreTrainedModel):
            raise ModaValueError(f"{name} is a wrapper: apply to the {type(child).__name__} inside, then wrap it")
    if not isinstance(model, PreTrainedModel):
        raise ModaValueError(f"{name} is not supported; wanted a transformers.PreTrainedModel with {SEAM}")
    found: list[tuple[str, str, str, tuple[int, ...], dict[int, str]]] = []
    reasons: set[str] = set()
    for path, module in model.named_modules():
        for stack, layers in module.named_children():
            if isinstance(layers, nn.ModuleList):
                attention, eligible, skipped = _survey(layers)
                if eligible:
                    found.append((path, stack, attention, eligible, skipped))
                reasons.update(skipped.values())
    if not found:
        near = f"; found {'; '.join(sorted(reasons)[:3])}" if reasons else ""
        raise ModaValueError(f"{name} is not supported: no layer with {SEAM}{near}")
    if len(found) > 1:
        paths = ", ".join(f"{path}.{stack}" for path, stack, *_ in found)
        raise ModaValueError(f"{name} is not supported: it has {len(found)} decoders, {paths}; wanted one")
    path, stack, attention, eligible, skipped = found[0]
    for owner in (*_owners(model, path), path):
        if not _takes_keywords(model.get_submodule(owner)):
            raise ModaValueError(
                f"{name} is not supported: the forward of {owner or name} takes no further keyword arguments, "
                "in which modality ids could reach the layers; let it take and hand on **kwargs, or apply to the model "
                "inside"
            )
    return Structure(path, stack, attention, eligible, skipped, _owners(model, path), _text_config(model, path))


def _survey(layers: nn.ModuleList) -> tuple[str, tuple[int, ...], dict[int, str]]:
    """The name of the attention, the indices of the layers that have it with the seam, and why the others do not."""
    names: dict[int, str] = {}
    skipped: dict[int, str] = {}
    for index, layer in enumerate(layers):
        reasons = []
        for name, child in layer.named_children():
            kind: Any = type(child)
            reason = _why_no_seam(kind)
            if reason is None:
                if getattr(child, "layer_idx", None) != index:
                    reason = f"its layer_idx is {getattr(child, 'layer_idx', None)}, wanted {index}"
                else:
                    names[index] = name
                    break
            if reason:
                reasons.append(f"{type(child).__name__}: {reason}")
        else:
            skipped[index] = "; ".join(reasons) or f"{type(layer).__name__} has no attention with a key/value cache"
    if not names:
        # Lists of other things; only what comes close to the seam is worth telling.
        return "", (), {index: why for index, why in skipped.items() if ": " in why}
    attention = next(iter(names.values()))
    odd = {index: f"its attention is {name}, not {attention}" for index, name in names.items() if name != attention}
    return attention, tuple(index for index in names if index not in odd), skipped | odd


#: Arguments of attention modules that look at something else than the tokens of their own sequence.
_CROSS = ("cross_attention_states", "encoder_hidden_states", "key_value_states")


@functools.cache
def _why_no_seam(cls: Any) -> str | None:
    """Why the attention class `cls` has no seam: None where it has, "" where it does not even take a cache."""
    forward = inspect.unwrap(cls.forward)
    try:
        arguments = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return ""
    if "past_key_values" not in arguments or not hasattr(forward, "__code__"):
        return ""
    if any(name in arguments for name in _CROSS):
        return "cross-attention, whose keys are not the text decoder's own tokens"
    names = [str(step.argval) for step in dis.get_instructions(forward) if step.opname.startswith("LOAD_")]
    if "update" not in names:
        return "never calls past_key_values.update"
    rotary = [place for place, name in enumerate(names) if "rotary" in name]
    if rotary and rotary[-1] > names.index("update"):
        return "rotates its keys after they went to the cache"
    return None


def _owners(model: nn.Module, decoder: str) -> tuple[str, ...]:
    parts = decoder.split(".") if decoder else []
    paths = [".".join(parts[:count]) for count in range(len(parts))] or [""]
    return tuple(path for path in paths if isinstance(model.get_submodule(path), PreTrainedModel))


def _text_config(model: nn.Module, decoder: str) -> str | None:
    outer: Any = model.config
    inner: Any = model.get_submodule(decoder).config
    if type(outer) is type(inner):
        return None
    for name in outer.sub_configs:
        if type(getattr(outer, name)) is type(inner):
            return str(name)
    raise ModaValueError(f"{type(model).__name__} is not supported: {type(inner).__name__} is no part of its config")
