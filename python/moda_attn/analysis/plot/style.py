"""How every picture looks: colours in a light and a dark variant, type, and the frame of a panel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ModaValueError
from ..optional import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """The colours of a picture, named by what they stand for; no two are the same, so that a page can change them.

    Own and other modality are a blue and an orange that stay apart in every common form of colour blindness; line
    styles and markers say the same once more.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    own: str
    cross: str
    pseudo: str
    generated: str
    further: str


LIGHT = Theme(
    paper="#ffffff",
    ink="#1f2328",
    muted="#59636e",
    grid="#d9dee4",
    own="#0067a5",
    cross="#c75100",
    pseudo="#7b838d",
    generated="#5fbf9b",
    further="#9c3a7e",
)
DARK = Theme(
    paper="#12161b",
    ink="#e8ebef",
    muted="#a5afba",
    grid="#363e48",
    own="#5cb8ec",
    cross="#f2a04a",
    pseudo="#8f99a5",
    generated="#1f8a69",
    further="#dd94c6",
)
THEMES = {"light": LIGHT, "dark": DARK}
SIZE = 9.0


def theme_of(style: str) -> Theme:
    """The theme of a name."""
    if style not in THEMES:
        raise ModaValueError(f"style={style!r}; {' or '.join(map(repr, THEMES))} wanted")
    return THEMES[style]


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """What is drawn inside takes these settings; matplotlib's own are as before afterwards."""
    matplotlib = need("matplotlib", "plot", "a picture of the balance")
    with matplotlib.rc_context(_settings(theme)):
        yield


def _settings(theme: Theme) -> dict[Any, object]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": SIZE,
        "text.color": theme.ink,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": "none",
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": SIZE,
        "axes.titlesize": SIZE + 1,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "xtick.labelsize": SIZE - 0.5,
        "ytick.labelsize": SIZE - 0.5,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": SIZE - 0.5,
        "svg.fonttype": "path",
        "svg.hashsalt": "moda-attn",
    }


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches that lays itself out and belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def grid_of_panels(count: int, size: tuple[float, float], columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes of that size in inches, two side by side."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(size[0] * columns, size[1] * rows + 0.35)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def legend_above(panels: Sequence[Axes]) -> None:
    """One legend for all panels, above them, of every label that one of them has; chance is named last."""
    figure: Any = panels[0].figure
    named = [pair for axes in panels for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True)]
    entries: dict[str, Any] = dict(sorted(named, key=lambda pair: "chance" in pair[0]))
    # Two rows where one would leave the figure.
    inches = sum(0.5 + 0.068 * len(label) for label in entries)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper left",
        ncols=len(entries) if inches < figure.get_figwidth() else -(-len(entries) // 2),
        handlelength=2.2,
        handletextpad=0.5,
        columnspacing=1.3,
        borderaxespad=0.3,
    )


def layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """Layers along x, at most some nine of them named."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(min(layers) - 0.35, max(layers) + 0.35)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.set_xlabel("layer")


def share_axis(axes: Axes, top: float = 1.0) -> None:
    """Shares of the attention up y, in per cent from 0."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
