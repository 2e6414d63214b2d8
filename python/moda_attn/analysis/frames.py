"""Balances as pandas tables; pandas is imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .measures import MEASURES
from .optional import need

if TYPE_CHECKING:
    import pandas

    from .compare import BalanceComparison
    from .report import BalanceReport


def masses_frame(report: BalanceReport) -> pandas.DataFrame:
    """A row for every kind of query rows and layer.

    Columns: ``rows_of``, ``modality``, ``answers_only``, ``layer``, then ``self``, ``cross`` and ``pseudo``, each with
    the ends of its interval in ``_low`` and ``_high``, then ``on_`` and the name of each modality: mass on its keys. At
    even attention these are ``self_chance``, ``cross_chance`` and ``on_..._chance``.
    """
    table = need("pandas", "plot", "to_pandas()")
    lines = []
    for row in report.every:
        by_key = np.nanmean(row.mass, axis=1)
        for place, layer in enumerate(report.layers):
            line = {"rows_of": row.name, "modality": row.modality, "answers_only": row.answers_only, "layer": layer}
            for column, name in enumerate(("self", "cross", "pseudo")):
                line[name] = getattr(row, f"{name}_mass")[place]
                line[f"{name}_low"], line[f"{name}_high"] = row.mass_interval[:, place, column]
            line["self_chance"], line["cross_chance"] = row.chance.self_mass[place], row.chance.cross_mass[place]
            for column, name in enumerate(row.columns[:-1]):
                line[f"on_{name}"] = by_key[place, column]
                line[f"on_{name}_chance"] = row.chance.mass[place, column]
            lines.append(line)
    return table.DataFrame(lines)


def changes_frame(result: BalanceComparison) -> pandas.DataFrame:
    """A row per kind of query rows and measure: ``before``, ``after``, ``change``, and its ``low`` and ``high``."""
    table = need("pandas", "plot", "to_pandas()")
    return table.DataFrame(
        {
            "rows_of": row.name,
            "measure": name,
            "before": getattr(row.before, name),
            "after": getattr(row.after, name),
            "change": row.changes[name].value,
            "low": row.changes[name].low,
            "high": row.changes[name].high,
        }
        for row in result.rows
        for name in MEASURES
    )
