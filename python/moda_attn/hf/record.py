"""Where the attention of each layer went, for any supported model, patched or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..config import ModaConfig
from ..layer import ModaLayer, attend
from ..state import LayerState, Queries

R = TypeVar("R", bound="Recorder")


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention is computed from in one forward call.

    Attributes:
        index: of the layer.
        config: of the patch; None where the model is only watched.
        layer: the layer's MODA parameters; None for plain attention.
        query: (B, Hq, n, D); key, value: (B, Hkv, K, D), the keys as they are attended to: aligned.
        state: of the keys; queries: the n queries.
        scale: of the scores.
    """

    index: int
    config: ModaConfig | None
    layer: ModaLayer | None
    query: Tensor
    key: Tensor
    value: Tensor
    state: LayerState
    queries: Queries
    scale: float

    def attend(self, *, value: Tensor | None = None, num_modalities: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The output (B, Hq, n, D), of another `value` where one is given, and, given M, the attention mass
        (B, Hq, n, M + 1) by modality of the key."""
        value = self.value if value is None else value
        tensors = (self.layer, self.query, self.key, value, self.state)
        return attend(*tensors, scale=self.scale, queries=self.queries, num_modalities=num_modalities)

    def in_dtype(self, dtype: torch.dtype) -> AttentionCall:
        """The same call on query, key and value of another dtype."""
        wide = {name: getattr(self, name).to(dtype) for name in ("query", "key", "value")}
        return replace(self, **wide)

    @property
    def num_modalities(self) -> int:
        """M: that of the configuration; without one, as many as there are among the keys, 2 at least."""
        if self.config is not None:
            return self.config.num_modalities
        ids = self.state.modality
        return max(2, int(ids.max()) + 1) if ids.numel() else 2


class Recorder(Protocol):
    """Computes the attention of a model's layers in the place of the model, and keeps what it wants to know of it.

    Attributes:
        labels: (B, n) of the last call, where the model itself merges them with the positions of images; else None.
    """

    labels: Tensor | None

    def attend(self, call: AttentionCall) -> Tensor:
        """The output of `call`, (B, Hq, n, D)."""
        ...


class LayerMass(NamedTuple):
    """Attention mass of one layer in one forward call.

    Attributes:
        mass: (B, Hq, n, M + 1), on the keys of each modality and, last, on the pseudo-scores.
        query_modality: (B, n), 0 text, 1 vision, -1 padding (whose mass is zero).
    """

    mass: Tensor
    query_modality: Tensor

    @property
    def by_relation(self) -> Tensor:
        """(B, Hq, n, 3): on keys of the query's own modality, on the others, and on the pseudo-scores."""
        keys, pseudo = self.mass[..., :-1], self.mass[..., -1]
        own = keys.gather(-1, self.query_modality.clamp(min=0).long()[:, None, :, None].expand(*keys.shape[:3], 1))[
            ..., 0
        ]
        return torch.stack([own, keys.sum(-1) - own, pseudo], dim=-1)


@dataclass
class MassRecorder:
    """Collects :class:`LayerMass` while installed by :func:`record_mass`.

    Attributes:
        layers: layer index -> one entry for each forward call (`generate` makes many).
        labels: (B, n) of the last call, where the model itself merges them with the positions of images; else None.
    """

    layers: dict[int, list[LayerMass]] = field(default_factory=lambda: defaultdict(list))
    labels: Tensor | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        """Called by the attention function."""
        output, mass = call.attend(num_modalities=call.num_modalities)
        assert mass is not None
        self.layers[call.index].append(LayerMass(mass, call.queries.modality))
        return output


@contextmanager
def record_mass(model: nn.Module) -> Iterator[MassRecorder]:
    """Record the attention mass of every text layer of `model` inside the block.

    ::

        with record_mass(model) as recorder:
            model(**inputs)
        mass, query_modality = recorder.layers[0][0]

    An unpatched model is watched for the duration of the block and left exactly as it was; its attention is computed
    by our kernel meanwhile, with the same result up to rounding.
    """
    with recording(model, MassRecorder()) as recorder:
        yield recorder


@contextmanager
def recording(model: nn.Module, recorder: R) -> Iterator[R]:
    """Have `recorder` compute the attention of every text layer of `model` inside the block."""
    from .patch import watching

    with watching(model) as runtime:
        outer, runtime.recorder = runtime.recorder, recorder
        try:
            yield recorder
        finally:
            runtime.recorder = outer
