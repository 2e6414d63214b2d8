"""Where each kind of query rows looks, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .style import Theme, drawing, grid_of_panels, layer_axis, legend_above, share_axis, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..compare import BalanceComparison
    from ..report import BalanceReport, RowBalance

PANEL = (3.9, 2.45)
#: Beyond so many layers the markers of a line touch.
MARKED = 20


def profile(report: BalanceReport, *, style: str = "light") -> Figure:
    """Mass on the own and on other modalities and on the pseudo-scores over the layers, a panel a kind of query rows.

    Thin lines are chance, what even attention to all keys that a query sees would give.

    Bands are 95 % intervals over the inputs; a single input has none.
    """
    theme = theme_of(style)
    with drawing(theme):
        figure, panels = grid_of_panels(len(report.every), PANEL)
        for axes, row in zip(panels, report.every, strict=True):
            axes.set_title(title_of(row))
            draw_profile(axes, report.layers, row, theme)
        legend_above(panels)
    return figure


def comparison(result: BalanceComparison, *, style: str = "light") -> Figure:
    """The profiles of two reports side by side on one scale, a line a kind of query rows."""
    theme = theme_of(style)
    with drawing(theme):
        figure, panels = grid_of_panels(2 * len(result.rows), PANEL)
        for place, row in enumerate(result.rows):
            pair = panels[2 * place : 2 * place + 2]
            sides = zip(pair, (result.before, result.after), (row.before, row.after), result.names, strict=True)
            for axes, report, balance, name in sides:
                axes.set_title(f"{title_of(balance)} · {name}")
                draw_profile(axes, report.layers, balance, theme)
            top = max(axes.get_ylim()[1] for axes in pair)
            for axes in pair:
                axes.set_ylim(0, top)
        legend_above(panels)
    return figure


def title_of(row: RowBalance) -> str:
    """ "Text queries", "Vision queries", "Text queries, answer rows"."""
    return row.name.partition(" (")[0].capitalize() + " queries" + (", answer rows" if row.answers_only else "")


def draw_profile(axes: Axes, layers: tuple[int, ...], row: RowBalance, theme: Theme) -> None:
    """The three masses as lines with their bands, and thin ones for chance."""
    for masses, colour in ((row.chance.self_mass, theme.own), (row.chance.cross_mass, theme.cross)):
        axes.plot(layers, masses, color=colour, lw=0.9, marker="_" if len(layers) == 1 else None, ms=14)
    lines = (
        ("own", row.self_mass, theme.own, "-", "o"),
        ("others", row.cross_mass, theme.cross, (0, (4, 1.6)), "s"),
        ("pseudo", row.pseudo_mass, theme.pseudo, (0, (1, 1.4)), "D"),
    )
    top = 1.0
    for place, (label, masses, colour, dashes, marker) in enumerate(lines):
        if place == 2 and not any(masses):
            continue  # a model without pseudo-scores
        low, high = row.mass_interval[:, :, place]
        if np.isfinite(low).all():
            axes.fill_between(layers, low, high, color=colour, alpha=0.22, linewidth=0)
        axes.plot(
            layers, masses, color=colour, ls=dashes, lw=1.8, marker=marker if len(layers) <= MARKED else None, ms=4,
            label=label, solid_capstyle="round", clip_on=False,
        )  # fmt: skip
        top = max(top, *masses)
    axes.plot([], [], color=theme.muted, lw=0.9, label="chance")
    layer_axis(axes, layers)
    share_axis(axes, 1.0 if top <= 1.0 + 1e-6 else 1.05 * top)
