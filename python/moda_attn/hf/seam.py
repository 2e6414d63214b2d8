"""The seam: a stand-in for the key/value cache that aligns keys after rotary embedding and before they are cached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..layer import ModaLayer
from ..state import LayerState, Queries
from .ids import ModaCall
from .memory import recall, remember


class CacheSeam:
    """Handed to one attention module as `past_key_values` for one call.

    The attention module calls :meth:`update` with its new keys; the seam aligns them, passes them on to the real
    cache (if there is one) and keeps what the attention function needs.

    `state` says that the module came by with its keys, `attended` that our attention function ran.

    Args:
        layer: the module's MODA parameters; None for a layer that attends plainly.
        call: the tokens of this forward call.
        cache: the real cache, or None.

    Attributes:
        state: the bases, and the modality of every key that :meth:`update` gave back.
        queries: the new tokens.
        attended: whether our attention function ran.
    """

    def __init__(self, layer: ModaLayer | None, call: ModaCall, cache: Any):
        self.layer = layer
        self.call = call
        self.cache = cache
        self.state: LayerState | None = None
        self.queries: Queries | None = None
        self.attended = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Align `key` (B, Hkv, n, D), store it with `value`, and return the keys and values to attend to."""
        modality = self.call.modality.to(key.device)
        before = None if self.cache is None else recall(self.cache, layer_idx)
        if self.layer is not None:
            context = self.call.context
            context = None if context is None else context.to(key.device)
            key, state = self.layer(key, value, modality, context=context, state=before)
        else:
            state = LayerState(modality)
        if self.cache is None:
            self.state, self.queries = state, state.queries(modality.shape[1])
            return key, value
        key, value = self.cache.update(key, value, layer_idx, *args, **kwargs)
        held, position = remember(self.cache, layer_idx, state, modality, *args, **kwargs)
        self.state, self.queries = replace(state, modality=held), Queries(modality, position)
        return key, value
