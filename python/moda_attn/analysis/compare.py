"""Two reports side by side: two models, or one before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ModaValueError
from .intervals import Change, paired_change, unpaired_change
from .measures import FACTORS, MEASURES
from .report import BalanceReport, RowBalance, plain, write_json

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RowComparison:
    """One kind of query rows in both reports.

    Attributes:
        before, after: the two balances.
        changes: of every measure, with its 95 % interval over the inputs: after minus before, for ``lift``, ``decay``
            and ``error``, which are factors, after over before. NaN where there is no interval (a single input).
    """

    before: RowBalance
    after: RowBalance
    changes: dict[str, Change]

    @property
    def name(self) -> str:
        return self.before.name

    def to_dict(self) -> dict[str, Any]:
        """Before, after and the change of every measure; the disparity that even attention would show."""
        return {
            "rows_of": self.name,
            "chance_disparity": {"before": self.before.chance.disparity, "after": self.after.chance.disparity},
            **{
                name: {
                    "before": plain(getattr(self.before, name)),
                    "after": plain(getattr(self.after, name)),
                    "ratio" if name in FACTORS else "difference": plain(self.changes[name].value),
                    "interval": plain(self.changes[name][1:]),
                }
                for name in MEASURES
            },
        }


@dataclass(frozen=True)
class BalanceComparison:
    """Two balances and what differs between them; made by `compare`.

    Attributes:
        before, after: the reports, with all they hold.
        names: what to call them.
        rows: a `RowComparison` per kind of query rows that both have.
        paired: whether both were measured on the same inputs.
    """

    before: BalanceReport
    after: BalanceReport
    names: tuple[str, str]
    rows: tuple[RowComparison, ...]
    paired: bool

    def to_dict(self) -> dict[str, Any]:
        """Both reports and the changes, ready for JSON."""
        return {
            "names": list(self.names),
            "paired": self.paired,
            "changes": [row.to_dict() for row in self.rows],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The JSON of `to_dict`, also written to ``path`` when given."""
        return write_json(self.to_dict(), path)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for every kind of query rows and measure; see `moda_attn.analysis.frames.changes_frame`."""
        from .frames import changes_frame

        return changes_frame(self)

    def plot(self, kind: str = "profile", **options: Any) -> Figure:
        """A picture: "profile" (masses over the layers, side by side) or "measures" (each from before to after).

        ``options`` go to the function of `moda_attn.analysis.plot`.
        """
        from .plot import draw_comparison

        return draw_comparison(self, kind, **options)

    def to_html(self, path: str | Path, **options: Any) -> Path:
        """Writes one self-contained page; ``options`` as in `moda_attn.analysis.html.ReportPage`."""
        from .html import ReportPage

        return ReportPage(self, **options).write(path)

    def __str__(self) -> str:
        from .table import comparison_table

        return comparison_table(self)


def compare(
    before: BalanceReport, after: BalanceReport, *, names: tuple[str, str] = ("before", "after"), paired: bool = True
) -> BalanceComparison:
    """What changed from one balance to another.

    Args:
        before, after: two models, or one before and after a change. Their layers may differ; E_DDA, a product over
            layers, then says little.
        names: what to call them.
        paired: both were measured on the same inputs in the same order. What the inputs have in common then cancels,
            and the intervals are those of the differences, input by input; otherwise Welch's for independent inputs.

    Raises:
        ModaValueError: ``paired`` with inputs that cannot be the same, or no kind of query rows in common.
    """
    common = [(row, _same_kind(after, row)) for row in before.every]
    pairs = [(row, other) for row, other in common if other is not None]
    if not pairs:
        raise ModaValueError("the two reports have no kind of query rows in common; nothing can be compared")
    change = paired_change if paired else unpaired_change
    rows = []
    for row, other in pairs:
        if paired and not np.array_equal(row.tally.rows, other.tally.rows):
            raise ModaValueError(
                f"paired=True wants both reports on the same inputs, but their {row.name} query rows differ:"
                f" {row.rows} of {len(row.tally.rows)} inputs and {other.rows} of {len(other.tally.rows)};"
                " measure both on the same inputs, or pass paired=False"
            )
        rows.append(RowComparison(row, other, change(row.tally, other.tally, (before.layers, after.layers))))
    return BalanceComparison(before, after, names, tuple(rows), paired)


def _same_kind(report: BalanceReport, row: RowBalance) -> RowBalance | None:
    wanted = (row.modality, row.answers_only)
    return next((other for other in report.every if (other.modality, other.answers_only) == wanted), None)
