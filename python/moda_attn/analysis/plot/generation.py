"""Where each generated token looked while it was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...config import TEXT, VISION
from ...errors import ModaValueError
from .style import Theme, drawing, legend_above, new_figure, share_axis, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..generation import GenerationBalance

#: Beyond so many tokens their words would overlap; they are counted then.
SPELLED = 32


def generation(
    balance: GenerationBalance,
    words: Sequence[str] | None = None,
    *,
    row: int = 0,
    layers: Sequence[int] | None = None,
    style: str = "light",
) -> Figure:
    """Stacked shares of attention for every generated token: image, prompt's text, generated so far, pseudo-scores; and
    a mark for the image's share at chance.

    Args:
        words: of the tokens, decoded one by one; default their numbers.
        row: of the batch.
        layers: places of the layers to take the mean over; default all.
    """
    theme = theme_of(style)
    with drawing(theme):
        figure = new_figure(min(11.0, max(4.8, 2.0 + 0.26 * balance.mass.shape[2])), 3.3)
        axes = figure.add_subplot()
        draw_generation(axes, balance, theme, words, row=row, layers=layers)
        legend_above([axes])
    return figure


def shares_of(balance: GenerationBalance, row: int = 0, layers: Sequence[int] | None = None) -> np.ndarray:
    """(2, T, M + 2) of one batch row, measured and at chance; means over layers, without what lies after its end."""
    both = np.stack([balance.mass, balance.chance])[:, :, row]
    shares = (both if layers is None else both[:, list(layers)]).mean(axis=1)
    return shares[:, np.isfinite(shares[0]).all(axis=-1)]


def draw_generation(
    axes: Axes,
    balance: GenerationBalance,
    theme: Theme,
    words: Sequence[str] | None = None,
    *,
    row: int = 0,
    layers: Sequence[int] | None = None,
) -> None:
    """A bar a token; from below: image, other modalities, prompt's text, generated before, pseudo-scores. A mark shows
    where the image's share would end at chance."""
    from matplotlib.ticker import MaxNLocator

    (shares, chance), columns = shares_of(balance, row, layers), balance.columns
    if words is not None and len(words) != len(shares):
        raise ModaValueError(f"{len(words)} words for {len(shares)} generated tokens; one for each wanted")
    last = len(columns) - 1
    further = [place for place in range(last - 1) if place not in (TEXT, VISION)]
    stack = (
        ("image", [VISION], theme.cross),
        (" and ".join(columns[place] for place in further), further, theme.further),
        ("prompt", [TEXT], theme.own),
        ("generated", [last - 1], theme.generated),
        ("pseudo", [last], theme.pseudo),
    )
    place, below = np.arange(1, len(shares) + 1), np.zeros(len(shares))
    apart = len(shares) <= SPELLED
    for label, members, colour in stack:
        part = shares[:, members].sum(axis=1)
        if not part.any():
            continue
        axes.bar(
            place, part, 0.86 if apart else 1.0, bottom=below, color=colour, label=label,
            edgecolor=theme.paper, linewidth=0.6 if apart else 0.0,
        )  # fmt: skip
        below = below + part
    axes.hlines(chance[:, VISION], place - 0.5, place + 0.5, color=theme.ink, lw=1.2, label="image at chance")
    share_axis(axes, max(1.0, float(below.max(initial=0.0))))
    # A short answer gets slim bars, not wide ones.
    axes.set_xlim(0.4, max(len(shares), 8) + 0.6)
    if words is None or not apart:
        axes.set_xticks(
            [tick for tick in MaxNLocator(9, integer=True).tick_values(1, len(shares)) if 1 <= tick <= len(shares)]
        )
        axes.set_xlabel("generated token")
    else:
        axes.set_xticks(place, [_shown(word) for word in words], rotation=50, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", length=0, labelcolor=theme.ink)


def _shown(word: str) -> str:
    """A token as a label: line breaks made visible, dollar signs no formulas, long ones cut."""
    word = word.strip(" ").replace("\n", "⏎").replace("$", r"\$") or "␣"
    return word if len(word) <= 14 else word[:13] + "…"
