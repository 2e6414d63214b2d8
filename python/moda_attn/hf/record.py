"""Where the attention of each layer went, for any supported model, patched or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn


class LayerMass(NamedTuple):
    """Attention mass of one layer in one forward call.

    Attributes:
        mass: (B, Hq, n, 3), on keys of the query's own modality, of the others, and on the pseudo-scores.
        query_modality: (B, n), 0 text, 1 vision, -1 padding (whose mass is zero).
    """

    mass: Tensor
    query_modality: Tensor


@dataclass
class MassRecorder:
    """Collects :class:`LayerMass` while installed by :func:`record_mass`.

    Attributes:
        layers: layer index -> one entry for each forward call (`generate` makes many).
        labels: (B, n) of the last call, where the model itself merges them with the positions of images; else None.
    """

    layers: dict[int, list[LayerMass]] = field(default_factory=lambda: defaultdict(list))
    labels: Tensor | None = None

    def add(self, layer: int, mass: Tensor, query_modality: Tensor) -> None:
        """Called by the attention function."""
        self.layers[layer].append(LayerMass(mass, query_modality))


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
    from .patch import watching

    recorder = MassRecorder()
    with watching(model) as runtime:
        outer, runtime.recorder = runtime.recorder, recorder
        try:
            yield recorder
        finally:
            runtime.recorder = outer
