"""The measures of two reports, from before to after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .profile import title_of
from .style import Theme, drawing, new_figure, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..compare import BalanceComparison

SHOWN = (("disparity", "disparity"), ("relative_disparity", "relative disparity"), ("pseudo_share", "pseudo share"))


def measures(result: BalanceComparison, *, style: str = "light") -> Figure:
    """The three measures that belong together, before (hollow) and after (full), with their intervals; a bar
    marks the disparity at chance."""
    theme = theme_of(style)
    with drawing(theme):
        figure = new_figure(4.4, 0.75 + 0.86 * len(result.rows))
        draw_measures(figure.add_subplot(), result, theme)
    return figure


def draw_measures(axes: Axes, result: BalanceComparison, theme: Theme) -> None:
    """A block a kind of query rows, a line a measure."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    ticks, names, block = [], [], len(SHOWN) + 1.25
    for place, row in enumerate(result.rows):
        start = place * block
        heading = {"facecolor": theme.paper, "edgecolor": "none", "pad": 1.5}
        axes.text(0.0, start - 0.85, title_of(row.before), weight="bold", va="center", bbox=heading)
        for line, (name, title) in enumerate(SHOWN):
            height = start + line
            before, after = (getattr(balance, name) for balance in (row.before, row.after))
            axes.plot([before, after], [height] * 2, color=theme.grid, lw=3, solid_capstyle="round", zorder=1)
            for balance, value, face in ((row.before, before, theme.paper), (row.after, after, theme.own)):
                low, high = balance.intervals[name]
                if np.isfinite(low) and high - low > 0:
                    axes.plot([low, high], [height] * 2, color=theme.own, lw=1.2, zorder=2)
                axes.plot(value, height, "o", ms=6, color=theme.own, mfc=face, mew=1.5, zorder=3, clip_on=False)
            for balance in (row.before, row.after):
                at_chance = getattr(balance.chance, name, None)  # the pseudo share has none
                if at_chance is not None:
                    axes.plot(at_chance, height, "|", ms=13, mew=1.5, color=theme.muted, zorder=2, clip_on=False)
            ticks.append(height)
            names.append(title)
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", labelcolor=theme.ink, pad=8)
    axes.set_ylim(block * (len(result.rows) - 1) + len(SHOWN) - 0.4, -1.3)
    axes.set_xlim(0, max(1.0, *axes.dataLim.intervalx))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    handles = [
        Line2D([], [], marker="o", ls="", color=theme.own, mfc=face, ms=6, mew=1.5, label=name)
        for face, name in zip((theme.paper, theme.own), result.names, strict=True)
    ]
    handles.append(Line2D([], [], marker="|", ls="", color=theme.muted, ms=11, mew=1.5, label="at chance"))
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.5)
