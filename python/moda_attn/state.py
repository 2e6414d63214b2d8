"""What a layer remembers between decoding steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """What attention must know about its n queries, which may be fewer than the keys.

    Attributes:
        modality: (B, n), -1 for padding.
        position: (B, n), 0-based among the real tokens of the row; meaningless for padding.
        key_range: (B|1, n, 2), the interval [first, last) of keys that each may see; None for the causal one.
    """

    modality: Tensor
    position: Tensor
    key_range: Tensor | None = None


@dataclass(frozen=True)
class LayerState:
    """Memory of one layer: the prompt's bases, and the modality of every key in its cache.

    Attributes:
        modality: (B, N), -1 for padding; N keys are cached.
        basis: (B, Hkv, M, D, D), or None where the configuration needs none.
        affinity: (B, Hkv, M, M), the likeness of the bases, or None without a location prior.
    """

    modality: Tensor
    basis: Tensor | None = None
    affinity: Tensor | None = None

    def queries(self, rows: int) -> Queries:
        """The last `rows` tokens as queries."""
        position = (self.modality >= 0).long().cumsum(-1) - 1
        first = self.modality.shape[1] - rows
        return Queries(self.modality[:, first:], position[:, first:])

    def extended(self, modality: Tensor) -> LayerState:
        """The state after more tokens (B, n); the bases stay those of the prompt."""
        return replace(self, modality=torch.cat([self.modality, modality.to(self.modality)], dim=-1))

    def rows(self, pick: Callable[[Tensor], Tensor]) -> LayerState:
        """The state with `pick` applied along the batch dimension of every tensor."""
        return LayerState(
            pick(self.modality),
            None if self.basis is None else pick(self.basis),
            None if self.affinity is None else pick(self.affinity),
        )


@dataclass
class ModaCache:
    """Keys and values of one :class:`~moda_attn.ModaAttention`, grown by every forward call that is given it."""

    key: Tensor | None = None
    value: Tensor | None = None
    state: LayerState | None = None

    def append(self, key: Tensor, value: Tensor, state: LayerState) -> tuple[Tensor, Tensor]:
        """Add aligned keys and values (B, Hkv, n, D) and return all of them."""
        self.key = key if self.key is None else torch.cat([self.key, key], dim=2)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=2)
        self.state = state
        return self.key, self.value
