"""How far apart the keys of two modalities lie, before and after alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .style import Theme, drawing, grid_of_panels, layer_axis, legend_above, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..keyspace import KeySpace

PANEL = (3.3, 2.5)
#: Name in `KeyGap` -> title of its panel.
TITLES = {
    "similarity": "similarity of the bases",
    "distance": "distance of the means",
    "frechet": "squared Fréchet distance",
}


def gap(space: KeySpace, *, pair: tuple[int, int] = (0, 1), style: str = "light") -> Figure:
    """Likeness and distance of the keys of two modalities over the layers.

    Lines are means over inputs and heads, thin ones the least and the largest head; bands are 95 % intervals over the
    inputs, of which a single one has none.
    """
    theme = theme_of(style)
    with drawing(theme):
        figure, panels = grid_of_panels(len(TITLES), PANEL, columns=3)
        for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
            axes.set_title(title)
            draw_gap(axes, space, name, theme, pair)
        legend_above(panels)
    return figure


def draw_gap(axes: Axes, space: KeySpace, name: str, theme: Theme, pair: tuple[int, int] = (0, 1)) -> None:
    """One number of `KeyGap`, a line a stage."""
    looks = {"before": (theme.pseudo, (0, (4, 1.6))), "after": (theme.own, "-")}
    bottom = top = 0.0
    for stage, found in space.stages.items():
        colour, dashes = looks[stage]
        # A layer with fewer heads than its neighbours is filled with NaN.
        known = np.ma.masked_invalid(getattr(found, name)[..., pair[0], pair[1]])
        low, mean, high = (np.ma.filled(reduced, np.nan) for reduced in (known.min(1), known.mean(1), known.max(1)))
        interval = space.interval(name, stage, pair)
        if np.isfinite(interval).all():
            axes.fill_between(space.layers, *interval, color=colour, alpha=0.22, linewidth=0)
        for head in (low, high):
            axes.plot(space.layers, head, color=colour, lw=0.7, alpha=0.75)
        marker = "o" if len(space.layers) == 1 else None
        axes.plot(space.layers, mean, color=colour, ls=dashes, lw=1.8, label=stage, marker=marker)
        top = max(top, float(np.nanmax([high, interval[1]], initial=0.0)))
        bottom = min(bottom, float(np.nanmin([low, interval[0]], initial=0.0)))
    layer_axis(axes, space.layers)
    axes.set_ylim(1.08 * bottom, 1.08 * top or 1.0)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
