"""How far apart the keys of the modalities lie, before and after alignment: the numbers and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..config import TEXT, VISION
from ..errors import ModaValueError
from .intervals import Change, of_mean
from .report import modality_name, plain, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class KeyGap(NamedTuple):
    """Likeness and distance of the modalities' keys, (..., M, M) each; NaN where one has no keys.

    With unit keys ``u``, their means ``mu`` and covariances ``S`` by modality:

    Attributes:
        similarity: ``<||G^m||, ||G^m'||> / D`` of the bases with unit rows, what the location prior reads; 1 is alike.
        distance: ``|mu^m - mu^m'|``, the modality gap of Liang et al. (2022), "Mind the Gap".
        frechet: ``|mu^m - mu^m'|^2 + tr(S^m + S^m' - 2 (S^m S^m')^(1/2))``, the squared Fréchet distance of two normal
            distributions (Dowson and Landau, 1982), which sees their spread too.
    """

    similarity: np.ndarray
    distance: np.ndarray
    frechet: np.ndarray


@dataclass(frozen=True)
class KeySpace:
    """The keys of the modalities, layer by layer and key head by key head; means over the inputs.

    Attributes:
        layers: indices of the layers, in order.
        before: (L, Hkv, M, M), of the keys as the model makes them, rotated.
        after: of the aligned keys; None for a model that is not patched.
        samples: "before" and "after" -> (U, L, M, M), means over the heads of each of U inputs.
    """

    layers: tuple[int, ...]
    before: KeyGap
    after: KeyGap | None
    samples: Mapping[str, KeyGap] = field(repr=False, compare=False)

    @property
    def stages(self) -> dict[str, KeyGap]:
        """Of "before" and "after" what was measured."""
        both = {"before": self.before, "after": self.after}
        return {stage: gap for stage, gap in both.items() if gap is not None}

    @property
    def inputs(self) -> int:
        """U, over how many inputs the means are."""
        return len(self.samples["before"].similarity)

    def interval(self, name: str, stage: str = "before", pair: tuple[int, int] = (TEXT, VISION)) -> np.ndarray:
        """(2, L): the 95 % interval over the inputs of one number between two modalities, of its mean over heads."""
        return of_mean(getattr(self.samples[stage], name)[..., pair[0], pair[1]])[1:]

    def summary(self, name: str, pair: tuple[int, int] = (TEXT, VISION)) -> dict[str, Change]:
        """One number between two modalities, mean over layers and heads, with its 95 % interval over the inputs.

        Args:
            name: "similarity", "distance" or "frechet".

        Returns:
            "before", and for a patched model "after" and "change": after minus before, input by input.
        """
        means = {stage: getattr(gap, name)[..., pair[0], pair[1]].mean(axis=-1) for stage, gap in self.samples.items()}
        if "after" in means:
            means["change"] = means["after"] - means["before"]
        return {stage: Change(*map(float, of_mean(values))) for stage, values in means.items()}

    def grouped_by(self, groups: Sequence[Any]) -> KeySpace:
        """The same, with intervals for which a group of inputs is one, such as all questions about a picture.

        Args:
            groups: what each input belongs to, in the order in which they were measured.
        """
        if len(groups) != self.inputs:
            raise ModaValueError(f"groups has {len(groups)} entries; one for each of {self.inputs} inputs wanted")
        names, place = np.unique(np.asarray(groups), return_inverse=True)

        def taken_together(values: np.ndarray) -> np.ndarray:
            return np.stack([of_mean(values[place == group])[0] for group in range(len(names))])

        samples = {stage: KeyGap(*map(taken_together, gap)) for stage, gap in self.samples.items()}
        return KeySpace(self.layers, self.before, self.after, samples)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; None stands for NaN."""
        names, count = KeyGap._fields, self.before.similarity.shape[-1]
        gaps = {"before": self.before, "after": self.after}
        return {
            "layers": list(self.layers),
            "modalities": [modality_name(modality) for modality in range(count)],
            "inputs": self.inputs,
            **{
                stage: None if gap is None else {name: plain(getattr(gap, name)) for name in names}
                for stage, gap in gaps.items()
            },
            "summary": {name: {stage: plain(change) for stage, change in self.summary(name).items()} for name in names},
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The JSON of `to_dict`, also written to ``path`` when given."""
        return write_json(self.to_dict(), path)

    def plot(self, **options: Any) -> Figure:
        """Likeness and distance over the layers; ``options`` as in `moda_attn.analysis.plot.gap`."""
        from .plot import gap

        return gap(self, **options)
