"""The key/value cache that carries ids and bases to every layer, and the seam that aligns keys before they enter it.

Keyword arguments do not reach the attention of transformers 4.37, and by default its models turn the cache into plain
tuples after every step. A cache object that the decoder is given stays what it is, and reaches every layer: also when
nothing is cached, and again when a checkpointed layer is recomputed.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ...layer import ModaLayer
from ...state import LayerState
from ..ids import ModaCall


@functools.cache
def cache_class(base: type) -> type:
    """A subclass of `base`, the ``DynamicCache`` of transformers 4.37."""

    class ModaLegacyCache(base):
        """Keys, values, and what MODA must know about them.

        Attributes:
            call: the tokens of the forward call that runs.
            storing: whether keys and values are kept at all.
            states: layer index -> memory of that layer.
        """

        call: ModaCall
        storing: bool = True

        def __init__(self) -> None:
            super().__init__()
            self.states: dict[int, LayerState] = {}

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Beam search keeps the rows `beam_idx` (B,)."""
            super().reorder_cache(beam_idx)
            for index, state in self.states.items():
                self.states[index] = state.rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    return ModaLegacyCache


class LegacySeam:
    """Handed to one attention module as `past_key_value` for one call: aligns keys, then caches them.

    Args:
        layer: the module's MODA parameters; None for a layer that attends plainly.
        cache: of :func:`cache_class`.
    """

    def __init__(self, layer: ModaLayer | None, cache: Any):
        self.layer = layer
        self.cache = cache
        self.state: LayerState | None = None

    def get_usable_length(self, new_seq_length: int, layer_idx: int = 0) -> int:
        """Number of cached keys."""
        return self.cache.get_usable_length(new_seq_length, layer_idx)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Align `key` (B, Hkv, n, D), store it with `value`, and return all keys and values."""
        call, before = self.cache.call, self.cache.states.get(layer_idx)
        modality = call.modality.to(key.device)
        if self.layer is not None:
            context = None if call.context is None else call.context.to(key.device)
            key, self.state = self.layer(key, value, modality, context=context, state=before)
        else:
            self.state = LayerState(modality) if before is None else before.extended(modality)
        if not self.cache.storing:
            return key, value
        self.cache.states[layer_idx] = self.state
        return self.cache.update(key, value, layer_idx, *args, **kwargs)
