"""The seam: a stand-in for the key/value cache that aligns keys after rotary embedding and before they are cached."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..errors import ModaRuntimeError
from ..layer import ModaLayer
from ..state import LayerState
from .ids import ModaCall


class CacheSeam:
    """Handed to one attention module as `past_key_values` for one call.

    The attention module calls :meth:`update` with its new keys; the seam aligns them, passes them on to the real
    cache (if there is one) and keeps what the attention function needs.

    Args:
        layer: the module's MODA parameters; None for a layer that attends plainly.
        call: the tokens of this forward call.
        cache: the real cache, or None.
    """

    def __init__(self, layer: ModaLayer | None, call: ModaCall, cache: Any):
        self.layer = layer
        self.call = call
        self.cache = cache
        self.state: LayerState | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Align `key` (B, Hkv, n, D), store it with `value`, and return all keys and values."""
        self.call.aligned.add(layer_idx)
        modality = self.call.modality.to(key.device)
        before = recall(self.cache, layer_idx)
        if self.layer is not None:
            context = self.call.context
            context = None if context is None else context.to(key.device)
            key, self.state = self.layer(key, value, modality, context=context, state=before)
        else:
            self.state = LayerState(modality) if before is None else before.extended(modality)
        if self.cache is None:
            return key, value
        key, value = self.cache.update(key, value, layer_idx, *args, **kwargs)
        remember(self.cache, layer_idx, self.state)
        return key, value


def recall(cache: Any, layer_idx: int) -> LayerState | None:
    """The state kept with one layer of `cache`; None where nothing is cached yet.

    Raises:
        ModaRuntimeError: the cache holds keys that were not put there by a patched model.
    """
    if cache is None or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    state: LayerState | None = getattr(layer, "moda_state", None)
    cached = layer.get_seq_length()
    if not isinstance(cached, int):
        return state
    if (0 if state is None else state.modality.shape[1]) != cached:
        raise ModaRuntimeError(
            f"layer {layer_idx} of the cache holds {cached} keys that this patched model did not put there; "
            "start from an empty cache"
        )
    return state if cached else None


def remember(cache: Any, layer_idx: int, state: LayerState) -> None:
    """Keep `state` with one layer of `cache`, through reordering, selecting, cropping and reset."""
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "moda_state"):
        cls: type = type(layer)
        layer.__class__ = _remembering(cls)
    layer.moda_state = state


@functools.cache
def _remembering(cls: type) -> type:
    """A subclass of a cache layer's class that carries the state along with the keys."""

    class Remembering(cls):
        moda_state: LayerState | None = None

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._pick(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._pick(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._pick(lambda tensor: tensor[indices])

        def crop(self, *args: Any, **kwargs: Any) -> None:
            super().crop(*args, **kwargs)
            if self.moda_state is not None:
                length = self.get_seq_length()
                self.moda_state = self.moda_state.shortened(length) if length else None

        def reset(self) -> None:
            super().reset()
            self.moda_state = None

        def _pick(self, pick: Any) -> None:
            if self.moda_state is not None:
                self.moda_state = self.moda_state.rows(pick)

    Remembering.__name__ = f"Moda{cls.__name__}"
    Remembering.__qualname__ = Remembering.__name__
    return Remembering
