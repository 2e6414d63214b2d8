"""The result of an attention balance: numbers, a dictionary, a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import MODALITIES


def modality_name(modality: int) -> str:
    """ "text", "vision", "video", "audio", and "modality 4" and so on for the free ones."""
    return MODALITIES[modality] if modality < len(MODALITIES) else f"modality {modality}"


def nullable(array: np.ndarray) -> list[Any]:
    """The array as nested lists in which None stands for NaN, so that they are valid JSON."""
    return np.where(np.isnan(array), np.full((), None, dtype=object), array).tolist()


@dataclass(frozen=True)
class RowBalance:
    """Where the query rows of one modality put their attention, layer by layer.

    Attributes:
        modality: the modality of the query rows.
        answers_only: whether only the rows that predict supervised tokens were counted.
        rows: how many query rows each mean was taken over (heads not counted).
        mass: (L, H, M + 1), of every layer and head the mean over rows of the mass on the keys of each modality and,
            last, on the pseudo-scores, which carry no value. H is the most heads that a layer has; NaN fills a layer
            with fewer.
        self_mass, cross_mass, pseudo_mass: per layer, mean over rows and heads of the mass on keys of the own modality,
            on keys of other modalities, and on the pseudo-scores.
        disparity: mean over layers of |self - cross|.
        relative_disparity: mean over layers of |self - cross| / (self + cross); unlike the plain one it does not fall
            merely because the pseudo-scores take mass from both.
        pseudo_share: mean over layers of the pseudo mass.
        decay: gamma = exp(slope of log cross over the layers); NaN with fewer than two layers or where a layer's cross
            mass is 0.
        error: E_DDA of the paper's equation 4, the product over layers l = 1 .. L of gamma^l |self_l - cross_l|.
    """

    modality: int
    answers_only: bool
    rows: int
    mass: np.ndarray = field(repr=False, compare=False)
    self_mass: tuple[float, ...]
    cross_mass: tuple[float, ...]
    pseudo_mass: tuple[float, ...]
    disparity: float
    relative_disparity: float
    pseudo_share: float
    decay: float
    error: float

    @property
    def columns(self) -> tuple[str, ...]:
        """What the last axis of `mass` counts: the names of the modalities, and "pseudo"."""
        return (*(modality_name(modality) for modality in range(self.mass.shape[-1] - 1)), "pseudo")

    @property
    def name(self) -> str:
        return modality_name(self.modality) + (" (answer rows)" if self.answers_only else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; NaN becomes None, so that the result is valid JSON."""
        scalars = {
            name: None if math.isnan(value := getattr(self, name)) else value
            for name in ("disparity", "relative_disparity", "pseudo_share", "decay", "error")
        }
        return {
            "rows_of": self.name,
            "modality": self.modality,
            "answers_only": self.answers_only,
            "rows": self.rows,
            "self": list(self.self_mass),
            "cross": list(self.cross_mass),
            "pseudo": list(self.pseudo_mass),
            "mass": nullable(self.mass),
            **scalars,
        }


@dataclass(frozen=True)
class BalanceReport:
    """The attention balance of a model on some inputs.

    Attributes:
        layers: indices of the measured layers, in order.
        modalities: one `RowBalance` per modality that has query rows.
        answers: the same for the answer rows alone; empty without labels.
        patched: whether the model was patched when it was measured.
    """

    layers: tuple[int, ...]
    modalities: tuple[RowBalance, ...]
    answers: tuple[RowBalance, ...] = ()
    patched: bool = False

    def of(self, modality: int, *, answers_only: bool = False) -> RowBalance:
        """The balance of one modality's query rows; raises ``KeyError`` when it has none."""
        for balance in self.answers if answers_only else self.modalities:
            if balance.modality == modality:
                return balance
        raise KeyError(f"no {'answer ' if answers_only else ''}query rows of {modality_name(modality)} in this report")

    def to_dict(self) -> dict[str, Any]:
        return {
            "patched": self.patched,
            "layers": list(self.layers),
            "modalities": [balance.to_dict() for balance in self.modalities],
            "answers": [balance.to_dict() for balance in self.answers],
        }

    def __str__(self) -> str:
        lines = [f"Attention balance, {'patched' if self.patched else 'unpatched'} model, {len(self.layers)} layers"]
        for balance in (*self.modalities, *self.answers):
            lines += ["", f"{balance.name}: {balance.rows} query rows", "  layer    self   cross  pseudo  |self-cross|"]
            masses = zip(self.layers, balance.self_mass, balance.cross_mass, balance.pseudo_mass, strict=True)
            for layer, own, cross, pseudo in masses:
                lines.append(f"  {layer:5d}  {own:6.3f}  {cross:6.3f}  {pseudo:6.3f}  {abs(own - cross):12.3f}")
            lines.append(
                f"  disparity {balance.disparity:.3f}, relative {balance.relative_disparity:.3f},"
                f" pseudo share {balance.pseudo_share:.3f}, decay {balance.decay:.3f}, E_DDA {balance.error:.2e}"
            )
        return "\n".join(lines)
