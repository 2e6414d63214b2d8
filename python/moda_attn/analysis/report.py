"""The result of an attention balance: numbers, a dictionary, a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import MODALITIES
from ..errors import ModaValueError
from .intervals import Interval
from .measures import MEASURES, DecayFit
from .tally import Tally

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def modality_name(modality: int) -> str:
    """ "text", "vision", "video", "audio", and "modality 4" and so on for the free ones."""
    return MODALITIES[modality] if modality < len(MODALITIES) else f"modality {modality}"


@dataclass(frozen=True)
class Chance:
    """What even attention would give the same query rows: to every key that they see alike, nothing to pseudo-scores.

    Query i sees n_i^m real keys of modality m; at chance its mass on them is n_i^m / sum_m' n_i^m' (with
    ``combine="split"`` the sum is over the own modality, and over all others).

    Attributes:
        self_mass, cross_mass: per layer, means over rows, as those of `RowBalance`. Layers differ where they see
            different keys, as with sliding windows.
        disparity, relative_disparity: of these masses.
        mass: (L, M), on the keys of each modality.
    """

    self_mass: tuple[float, ...]
    cross_mass: tuple[float, ...]
    disparity: float
    relative_disparity: float
    mass: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "self": list(self.self_mass),
            "cross": list(self.cross_mass),
            "mass": plain(self.mass),
            "disparity": self.disparity,
            "relative_disparity": self.relative_disparity,
        }


@dataclass(frozen=True)
class RowBalance:
    """Where the query rows of one modality put their attention, layer by layer.

    Attributes:
        modality: the modality of the query rows.
        answers_only: whether only the rows that predict supervised tokens were counted.
        rows: how many query rows each mean was taken over (heads not counted).
        inputs: how many independent inputs these rows come from.
        mass: (L, H, M + 1), of every layer and head the mean over rows of the mass on the keys of each modality and,
            last, on the pseudo-scores, which carry no value. H is the most heads that a layer has; NaN fills a layer
            with fewer.
        self_mass, cross_mass, pseudo_mass: per layer, mean over rows and heads of the mass on keys of the own modality,
            on keys of other modalities, and on the pseudo-scores.
        chance: what even attention would give these rows; what the numbers below are to be held against.
        disparity: mean over layers of |self - cross|.
        relative_disparity: mean over layers of |self - cross| / (self + cross); unlike the plain one it does not fall
            merely because the pseudo-scores take mass from both.
        pseudo_share: mean over layers of the pseudo mass.
        lift: cross-modal attention over chance: the mean over layers of cross / (self + cross), divided by the same at
            chance. Below 1 the other modalities get less than even attention would give them; NaN where no row sees a
            key of another modality.
        decay: gamma = exp(slope of log cross over the layers); NaN with fewer than two layers or where a layer's cross
            mass is 0.
        error: E_DDA of the paper's equation 4, the product over layers l = 1 .. L of gamma^l |self_l - cross_l|.
        decay_fit: how well the layers fix gamma, and what follows for E_DDA.
        intervals: of each of these six the 95 % interval over the inputs; NaN with a single input.
        mass_interval: (2, L, 3), the same for self, cross and pseudo mass.
        tally: the sums behind all of it, input by input.
    """

    modality: int
    answers_only: bool
    rows: int
    inputs: int
    mass: np.ndarray = field(repr=False, compare=False)
    self_mass: tuple[float, ...]
    cross_mass: tuple[float, ...]
    pseudo_mass: tuple[float, ...]
    chance: Chance
    disparity: float
    relative_disparity: float
    pseudo_share: float
    lift: float
    decay: float
    error: float
    decay_fit: DecayFit
    intervals: dict[str, Interval]
    mass_interval: np.ndarray = field(repr=False, compare=False)
    tally: Tally = field(repr=False, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """What the last axis of `mass` counts: the names of the modalities, and "pseudo"."""
        return (*(modality_name(modality) for modality in range(self.mass.shape[-1] - 1)), "pseudo")

    @property
    def name(self) -> str:
        return modality_name(self.modality) + (" (answer rows)" if self.answers_only else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; NaN becomes None, so that the result is valid JSON."""
        return {
            "rows_of": self.name,
            "modality": self.modality,
            "answers_only": self.answers_only,
            "rows": self.rows,
            "inputs": self.inputs,
            "self": list(self.self_mass),
            "cross": list(self.cross_mass),
            "pseudo": list(self.pseudo_mass),
            "mass_interval": plain(self.mass_interval),
            "mass_columns": list(self.columns),
            "mass": plain(self.mass),
            "chance": self.chance.to_dict(),
            **{name: plain(getattr(self, name)) for name in MEASURES},
            "intervals": {name: plain(interval) for name, interval in self.intervals.items()},
            "decay_fit": {name: plain(value) for name, value in vars(self.decay_fit).items()},
        }


@dataclass(frozen=True)
class BalanceReport:
    """The attention balance of a model on some inputs.

    Attributes:
        layers: indices of the measured layers, in order.
        modalities: one `RowBalance` per modality that has query rows.
        answers: the same for the answer rows alone; empty without labels.
        patched: whether the model was patched when it was measured.
        unmeasured: index of every other layer -> why it is not measured and in no mean. Cross-attention to an image,
            such as Mllama's, is one: all of its mass is on vision by construction.
    """

    layers: tuple[int, ...]
    modalities: tuple[RowBalance, ...]
    answers: tuple[RowBalance, ...] = ()
    patched: bool = False
    unmeasured: dict[int, str] = field(default_factory=dict)

    @property
    def every(self) -> tuple[RowBalance, ...]:
        """All kinds of query rows: those of each modality, then the answer rows."""
        return (*self.modalities, *self.answers)

    def of(self, modality: int, *, answers_only: bool = False) -> RowBalance:
        """The balance of one modality's query rows; raises ``KeyError`` when it has none."""
        for balance in self.answers if answers_only else self.modalities:
            if balance.modality == modality:
                return balance
        raise KeyError(f"no {'answer ' if answers_only else ''}query rows of {modality_name(modality)} in this report")

    def grouped_by(self, groups: Sequence[Any]) -> BalanceReport:
        """The same numbers, with intervals for which a group of inputs is one, such as all questions about a picture.

        Args:
            groups: what each input belongs to, in the order in which they were measured.
        """
        from .statistics import report_of

        wanted = {len(row.tally.rows) for row in self.every}
        if wanted != {len(groups)}:
            raise ModaValueError(f"groups has {len(groups)} entries; one for each of {max(wanted)} inputs wanted")
        names = np.asarray(groups)
        tallies = {(row.modality, row.answers_only): row.tally.grouped(names) for row in self.every}
        return report_of(tallies, self.layers, patched=self.patched, unmeasured=self.unmeasured)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        return {
            "patched": self.patched,
            "layers": list(self.layers),
            "unmeasured": self.unmeasured,
            "modalities": [balance.to_dict() for balance in self.modalities],
            "answers": [balance.to_dict() for balance in self.answers],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The JSON of `to_dict`, also written to ``path`` when given, whose folder is made when missing."""
        return write_json(self.to_dict(), path)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for every kind of query rows and layer; see `moda_attn.analysis.frames.masses_frame`."""
        from .frames import masses_frame

        return masses_frame(self)

    def plot(self, kind: str = "profile", **options: Any) -> Figure:
        """A picture: "profile" (masses over the layers) or "heads" (a map of heads and layers).

        ``options`` go to the function of that name in `moda_attn.analysis.plot`.
        """
        from .plot import draw_balance

        return draw_balance(self, kind, **options)

    def to_html(self, path: str | Path, **options: Any) -> Path:
        """Writes one self-contained page; ``options`` as in `moda_attn.analysis.html.ReportPage`."""
        from .html import ReportPage

        return ReportPage(self, **options).write(path)

    def __str__(self) -> str:
        from .table import balance_table

        return balance_table(self)


def plain(value: Any) -> Any:
    """Lists for arrays and tuples, None for NaN and the infinities: what JSON can say."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def write_json(content: dict[str, Any], path: str | Path | None) -> str:
    """``content`` as JSON text, also written to ``path`` unless that is None."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return text
