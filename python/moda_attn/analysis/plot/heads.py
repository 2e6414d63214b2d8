"""Which heads look at their own modality, and which at others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .profile import title_of
from .style import LIGHT, Theme, drawing, grid_of_panels, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..report import BalanceReport, RowBalance

PANEL = (3.9, 3.0)
#: The middle of the scale: as far from the blue as from the orange, and seen on white and on black.
EVEN = "#ececec"


def heads(report: BalanceReport, *, style: str = "light") -> Figure:
    """A map of layers and heads for each kind of query rows: mass on the own less mass on the other modalities."""
    theme = theme_of(style)
    with drawing(theme):
        figure, panels = grid_of_panels(len(report.every), PANEL)
        for axes, row in zip(panels, report.every, strict=True):
            axes.set_title(title_of(row))
            draw_heads(axes, report.layers, row, theme)
    return figure


def draw_heads(axes: Axes, layers: tuple[int, ...], row: RowBalance, theme: Theme) -> None:
    """Blue: a head looks at its own modality; orange: at others; pale: at both alike, or at the pseudo-scores.

    A line on the colour bar marks chance.
    """
    own = row.mass[..., row.modality]
    others = np.delete(row.mass[..., :-1], row.modality, axis=-1).sum(axis=-1)
    image = axes.imshow(
        own - others, cmap=_colours(), vmin=-1, vmax=1, aspect="auto", interpolation="none", origin="upper"
    )
    count = own.shape[1]
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    _ticks(axes.xaxis, range(count))
    _ticks(axes.yaxis, layers)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    # Lines between the cells, while cells are large enough to have some.
    if max(own.shape) <= 16:
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(layers) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=theme.paper, linewidth=1.2)
        axes.tick_params(which="minor", length=0)
    bar = axes.figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], shrink=0.95, pad=0.03, aspect=18)
    bar.ax.set_yticklabels(["all on\nothers", "both\nalike", "all on\nown"])
    chance = float(np.mean(np.subtract(row.chance.self_mass, row.chance.cross_mass)))
    bar.ax.axhline(chance, color=theme.ink, linewidth=1.2)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _ticks(axis: Any, names: Any) -> None:
    """At most some nine of the names, evenly spread."""
    step = max(1, -(-len(names) // 9))
    axis.set_ticks(range(0, len(names), step), [str(name) for name in names][::step])


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("own_or_others", [LIGHT.cross, EVEN, LIGHT.own])
