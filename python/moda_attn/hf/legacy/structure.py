"""Recognising a model of the original LLaVA or Cambrian-1 code by what it offers."""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

from torch import nn

from ...errors import ModaValueError
from ..structure import Structure

#: The method of these code bases that puts image features between the text embeddings.
PREPARE = "prepare_inputs_labels_for_multimodal"

#: What that method must take and, at these places of the tuple, return.
PREPARED = ("input_ids", "position_ids", "attention_mask", "past_key_values", "inputs_embeds", "labels")

#: The attention of transformers 4.37; its SDPA and flash variants are subclasses.
ATTENTION = "LlamaAttention"

_OWN_ARGUMENTS = ("hidden_states", "attention_mask", "position_ids", "past_key_value", "output_attentions", "use_cache")
_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "rotary_emb")


class LegacyStructure(Structure):
    """Of a model of the original code: its decoder is a Llama model of transformers 4.37."""

    def set_attention(self, model: nn.Module, name: str) -> None:
        """Note the attention implementation in the decoder's configuration; the patched modules read it there."""
        config: Any = self.decoder_of(model).config
        config._attn_implementation = name


def legacy_structure(model: nn.Module) -> LegacyStructure | None:
    """Where a model of the original code keeps its attention; None for any other model.

    Raises:
        ModaValueError: the method that merges images and text is there, but has other arguments than expected, or the
            attention is not the one of transformers 4.37.
    """
    name, prepare = type(model).__name__, getattr(model, PREPARE, None)
    if not callable(prepare):
        return None
    if PREPARE in vars(model):
        raise ModaValueError(f"{name} has a {PREPARE} on the instance, another patch's: undo that first")
    missing = {*PREPARED, "images"} - {"inputs_embeds"} - set(inspect.signature(prepare).parameters)
    if missing:
        raise ModaValueError(f"the {PREPARE} of {name} takes no {', '.join(sorted(missing))}")
    decoder = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ModaValueError(f"{name} has {PREPARE}, but no decoder layers at model.layers")
    for layer in layers:
        _check(name, cast("nn.Module", layer.self_attn))
    return LegacyStructure("model", "layers", "self_attn", tuple(range(len(layers))))


def llama_namespace(attention: nn.Module) -> dict[str, Any]:
    """The names next to the definition of `attention`'s Llama class: its rotary embedding, its cache classes."""
    for cls in type(attention).__mro__:
        if cls.__name__ == ATTENTION:
            return vars(sys.modules[cls.__module__])
    raise AssertionError("checked when the model was patched")


def _check(model: str, attention: nn.Module) -> None:
    names = [cls.__name__ for cls in type(attention).__mro__]
    if ATTENTION not in names:
        raise ModaValueError(f"{model} with text attention {names[0]}; wanted {ATTENTION} of transformers 4.37")
    wanted = {f"forward argument {name}" for name in _OWN_ARGUMENTS} | {f"part {name}" for name in _PARTS}
    found = {f"forward argument {name}" for name in inspect.signature(type(attention).forward).parameters}
    found |= {f"part {name}" for name, _ in attention.named_children()}
    wanted |= {"DynamicCache beside it", "apply_rotary_pos_emb beside it"}
    found |= {f"{name} beside it" for name in llama_namespace(attention)}
    if wanted - found or "forward argument cache_position" in found:
        lacks = ", ".join(sorted(wanted - found)) or "nothing, but takes cache_position"
        raise ModaValueError(
            f"{model} has {PREPARE}, but its {names[0]} is not the one of transformers 4.37 (it lacks {lacks}); "
            "install the version that the model's code pins"
        )
