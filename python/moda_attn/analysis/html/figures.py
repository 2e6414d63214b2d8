"""Pictures for a page: SVG whose colours follow the reader's light or dark scheme, and heat maps over an image."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import fields
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ..optional import need
from ..plot.style import DARK, LIGHT, Theme, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {getattr(LIGHT, colour.name): f"var(--{colour.name})" for colour in fields(Theme)}
_FONT = "DejaVuSans"
#: A photograph is shown at most so many pixels wide and high.
LARGEST_PICTURE = 384


def colour_rules() -> str:
    """The style sheet's variables: the colours of `Theme`, light and dark."""
    light, dark = (
        " ".join(f"--{colour.name}: {getattr(theme, colour.name)};" for colour in fields(Theme))
        for theme in (LIGHT, DARK)
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def panel(name: str, size: tuple[float, float], alt: str, draw: Callable[[Axes], None]) -> str:
    """An inline SVG of one panel that ``draw`` fills; ``name`` sets its ids apart from other pictures' on the page."""
    with drawing(LIGHT):
        figure = new_figure(*size)
        draw(figure.add_subplot())
        return _svg(figure, name, alt)


def _svg(figure: Figure, name: str, alt: str) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    # Ids are unique within a picture only, and a page holds many; letters are the same in all of them.
    text = re.sub(rf'\bid="(?!{_FONT})', f'id="{name}-', text)
    text = re.sub(rf'(href="#|url\(#)(?!{_FONT})', rf"\g<1>{name}-", text)
    # What nobody sees or refers to is half of what matplotlib writes.
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<g/>", "", text)
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><")
    text = re.sub(r' (d|x|y)="[^"]*"|translate\([^)]*\)', lambda place: re.sub(r"(\.\d\d)\d+", r"\1", place[0]), text)
    text = re.sub(r"<svg ([^>]*)", rf'<svg role="img" aria-label="{escape(alt)}" \1', text, count=1)
    return re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text, count=2)


def share_letters(page: str) -> str:
    """The page with every letter's shape defined once, by the first picture that has it, instead of in each."""
    known: set[str] = set()

    def first_only(shape: re.Match[str]) -> str:
        if shape[1] in known:
            return ""
        known.add(shape[1])
        return shape[0]

    page = re.sub(rf'<path id="({_FONT}[^"]*)"[^>]*/>\s*', first_only, page)
    return re.sub(r"<defs>\s*</defs>\s*", "", page)


def picture_definition(picture: Any, name: str) -> tuple[str, tuple[int, int]]:
    """A hidden SVG that holds the picture once, for `heat_panel` to use many times; and its width and height."""
    image_module = need("PIL.Image", "plot", "a picture in the report")
    image = picture if isinstance(picture, image_module.Image) else image_module.fromarray(_bytes(picture))
    image = image.convert("L")
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    width, height = image.size
    # Small scans keep their pixels; photographs are a tenth of the size as JPEG.
    small = max(width, height) <= 64
    source = _data_uri(image, "PNG" if small else "JPEG")
    rendering = "pixelated" if small else "auto"
    return (
        '<svg class="hidden" aria-hidden="true"><defs>'
        f'<image id="{name}" width="{width}" height="{height}" href="{source}" style="image-rendering:{rendering}"/>'
        "</defs></svg>",
        (width, height),
    )


def heat_panel(heat: np.ndarray, top: float, size: tuple[int, int], picture: str | None, alt: str) -> str:
    """An inline SVG of one map, over the picture of that id where there is one.

    Args:
        heat: (height, width) relative to an even share; ``top``: the end of the scale.
        size: width and height of the picture, or of the map without one.
    """
    from matplotlib import colormaps

    image_module = need("PIL.Image", "plot", "a picture in the report")
    relative = np.clip(heat / top, 0, 1)
    colours = colormaps["inferno"](relative)
    if picture is not None:
        colours[..., 3] = 0.08 + 0.77 * np.sqrt(relative)
    source = _data_uri(image_module.fromarray((255 * colours).round().astype(np.uint8)), "PNG")
    width, height = size
    below = "" if picture is None else f'<use href="#{picture}"/>'
    return (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width} {height}">{below}'
        f'<image width="{width}" height="{height}" preserveAspectRatio="none" href="{source}"'
        ' style="image-rendering:pixelated"/></svg>'
    )


def heat_scale(steps: int = 9) -> str:
    """The colours of `heat_panel` as a CSS gradient."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    stops = ", ".join(to_hex(colormaps["inferno"](place)) for place in np.linspace(0, 1, steps))
    return f"linear-gradient(to right, {stops})"


def _bytes(picture: Any) -> np.ndarray:
    """(H, W) or (H, W, 3) of any range as bytes."""
    pixels = np.asarray(picture, dtype=np.float64)
    low, high = pixels.min(), pixels.max()
    return (255 * (pixels - low) / (high - low if high > low else 1)).astype(np.uint8)


def _data_uri(image: Any, kind: str) -> str:
    written = io.BytesIO()
    image.save(written, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(written.getvalue()).decode('ascii')}"
