"""The pieces that the sections of a page are put together from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import TYPE_CHECKING

from ..plot.style import legend_above
from .figures import panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def section(title: str, parts: Iterable[str]) -> str:
    """A heading and what is below it."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def text(*sentences: str) -> str:
    """A paragraph."""
    return f"<p>{escape(' '.join(filter(None, sentences)))}</p>"


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences."""
    return f'<ul class="list">{"".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)}</ul>'


def panels(figures: Iterable[str], columns: str = "") -> str:
    """Figures side by side on a desktop, one below the other on a phone."""
    return f'<div class="panels {columns}">{"".join(figures)}</div>'


def figure(picture: str, caption: str) -> str:
    """A picture above its caption."""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def drawing(
    key: str,
    size: tuple[float, float],
    title_and_alt: tuple[str, str],
    draw: Callable[[Axes], None],
    *,
    legend: bool = True,
) -> str:
    """A picture of one panel below its title; ``key`` sets its ids apart from other pictures' on the page."""

    def fill(axes: Axes) -> None:
        draw(axes)
        if legend:
            legend_above([axes])

    title, alt = title_and_alt
    picture = panel(key, size, f"{title}: {alt}", fill)
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{picture}</figure>"
