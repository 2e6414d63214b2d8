"""How far apart the keys of two modalities lie, before and after alignment."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Likeness and distance of the keys of two modalities over the layers; lines: mean over heads, bands: all heads."""
    theme = theme_of(style)
    with drawing(theme):
        figure, panels = grid_of_panels(len(TITLES), PANEL, columns=3)
        for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
            axes.set_title(title)
            draw_gap(axes, space.layers, heads_of(space, name, pair), theme)
        legend_above(panels)
    return figure


def heads_of(space: KeySpace, name: str, pair: tuple[int, int] = (0, 1)) -> dict[str, np.ndarray]:
    """Stage -> (L, H) of one number between two modalities; only what was measured."""
    stages = {"before alignment" if space.after else "keys": space.before, "after alignment": space.after}
    return {stage: getattr(found, name)[..., pair[0], pair[1]] for stage, found in stages.items() if found is not None}


def draw_gap(axes: Axes, layers: Sequence[int], stages: dict[str, np.ndarray], theme: Theme) -> None:
    """A line a stage, within the band of its heads."""
    looks = ((theme.pseudo, (0, (4, 1.6))), (theme.own, "-"))[2 - max(len(stages), 1) :]
    bottom = top = 0.0
    for (stage, heads), (colour, dashes) in zip(stages.items(), looks, strict=False):
        # A layer with fewer heads than its neighbours is filled with NaN.
        known = np.ma.masked_invalid(heads)
        low, mean, high = (np.ma.filled(reduced, np.nan) for reduced in (known.min(1), known.mean(1), known.max(1)))
        axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(layers, mean, color=colour, ls=dashes, lw=1.8, label=stage, marker="o" if len(layers) == 1 else None)
        top = max(top, float(np.nanmax(high, initial=0.0)))
        bottom = min(bottom, float(np.nanmin(low, initial=0.0)))
    layer_axis(axes, layers)
    axes.set_ylim(1.08 * bottom, 1.08 * top or 1.0)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
