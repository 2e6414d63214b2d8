"""What a patched model keeps with a key/value cache: of every layer the bases of the prompt and which key is what."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ModaRuntimeError
from ..state import LayerState
from .derived import derived

#: Added to a modality id when it is stored: a static cache fills what it does not hold yet with zeros, and in some
#: releases of transformers it counts its tokens by what is not zero. Padding, -1, becomes 1.
_SHIFT = 2


def recall(cache: Any, layer_idx: int) -> LayerState | None:
    """What is kept with one layer of `cache`: its bases, and (B, 0) modality ids; None where nothing is cached yet.

    Raises:
        ModaRuntimeError: the cache is of a kind that has no layers, or holds keys that no patched model put there.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ModaRuntimeError(
            f"a cache of type {type(cache).__name__} has no layers to keep the bases with; use a cache of "
            "transformers (dynamic, static or sliding)"
        )
    if layer_idx >= len(layers):
        return None
    layer = layers[layer_idx]
    state: LayerState | None = getattr(layer, "moda_state", None)
    held = 0 if torch.compiler.is_compiling() else layer.get_seq_length()
    if isinstance(held, Tensor) and held.device.type != "cpu":
        return state  # Reading the length would wait for the device.
    known = 0 if state is None or not int(held) else layer.moda_tokens.get_seq_length()
    if int(known) != int(held):
        raise ModaRuntimeError(
            f"layer {layer_idx} of the cache holds {int(held)} keys that this patched model did not put there; "
            "start from an empty cache"
        )
    return state


def is_filled(cache: Any) -> bool:
    """Whether `cache` holds a prompt of a patched model."""
    return any(getattr(layer, "moda_state", None) is not None for layer in getattr(cache, "layers", ()))


def remember(
    cache: Any, layer_idx: int, state: LayerState, modality: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Keep the bases of `state` and the ids of new tokens with one layer of `cache`, which holds their keys already.

    Bases and ids follow the keys through reordering, selecting, repeating, cropping and reset: the ids lie in a cache
    layer of the same kind, a twin, which is told everything that the layer is told.

    Args:
        modality: (B, n) of the new tokens.
        args, kwargs: what the cache's `update` was given besides keys and values.

    Returns:
        The modality of the keys that the layer gave back, (B, K), -1 where a static cache holds nothing yet; and of
        every new token its 0-based position among the real tokens of its row, (B, n).
    """
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "moda_state"):
        twin = _empty_twin(layer)
        cls: type = type(layer)
        layer.__class__ = _remembering(cls)
        layer.moda_tokens = twin
    # Nothing of the ids: they are in the twin. Always of the same strides, for one compiled graph.
    layer.moda_state = replace(state, modality=modality.new_empty(modality.shape[0], 0))
    return layer.note(modality, *args, **kwargs)


def _empty_twin(layer: Any) -> Any:
    """An empty cache layer that treats its content as `layer` does."""
    if hasattr(layer, "_quantize"):
        # Ids must come back as they are; what a quantized layer gives back is every key, as a dynamic one does.
        from transformers.cache_utils import DynamicLayer

        return DynamicLayer()
    twin = copy.copy(layer)
    for name, content in vars(layer).items():
        if isinstance(content, Tensor):
            setattr(twin, name, None if name in ("keys", "values") else content.clone())
    twin.is_initialized = False  # `reset` would clear tensors that are not there.
    twin.reset()
    return twin


@functools.cache
def _remembering(cls: type) -> type:
    """A subclass of a cache layer's class that carries bases and ids along with the keys."""

    class Remembering(cls):
        moda_state: LayerState | None
        moda_tokens: Any

        def note(self, modality: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            twin = self.moda_tokens
            count = (modality >= 0).long().cumsum(-1)
            if twin.is_initialized and twin.values.numel():
                count = count + twin.values.amax(dim=(1, 2, 3))[:, None]
            stored = (modality.long() + _SHIFT)[:, None, :, None]
            ids, _ = twin.update(stored, count[:, None, :, None], *args, **kwargs)
            return (ids[:, 0, :, 0] - _SHIFT).clamp(min=-1), count - 1

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.moda_tokens.reorder_cache(beam_idx)
            self._pick(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.moda_tokens.batch_repeat_interleave(repeats)
            self._pick(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.moda_tokens.batch_select_indices(indices)
            self._pick(lambda tensor: tensor[indices])

        def crop(self, *args: Any, **kwargs: Any) -> None:
            super().crop(*args, **kwargs)
            self.moda_tokens.crop(*args, **kwargs)
            if not self.get_seq_length():
                self.moda_state = None

        def reset(self) -> None:
            super().reset()
            self.moda_tokens.reset()
            self.moda_state = None

        def _pick(self, pick: Any) -> None:
            if self.moda_state is not None:
                self.moda_state = self.moda_state.rows(pick)

    if hasattr(cls, "activate_past_recording"):  # transformers asks whether a layer has it

        def activate_past_recording(self: Any) -> None:
            cls.activate_past_recording(self)
            self.moda_tokens.activate_past_recording()

        Remembering.activate_past_recording = activate_past_recording

    return derived(_remembering, Remembering)
