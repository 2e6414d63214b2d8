"""Where on an image the attention lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ModaValueError
from .style import drawing, new_figure, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 1.75
#: How many layers are shown where none are named.
SHOWN = 3


def image(
    heat: np.ndarray,
    picture: Any = None,
    *,
    layers: Sequence[int] | None = None,
    shown: Sequence[int] | None = None,
    style: str = "light",
) -> Figure:
    """Heat maps over an image: the mean over layers, and some layers by themselves.

    Args:
        heat: (L, height, width), the attention mass that each visual token receives, as
            `ReceivedAttention.heat_map` gives it.
        picture: what the model saw: a PIL image or an array (H, W) or (H, W, 3). Drawn in grey below the heat; default
            none.
        layers: the layers' indices; default 0, 1, ...
        shown: the places among them to show; default the first, the last and one between.

    Raises:
        ModaValueError: ``heat`` of another shape, or places that do not exist.
    """
    heat = np.asarray(heat, dtype=np.float64)
    if heat.ndim != 3 or heat.shape[0] == 0:
        raise ModaValueError(f"heat has shape {heat.shape}; (L, height, width) with L >= 1 wanted")
    layers = range(len(heat)) if layers is None else layers
    places = spread(len(heat), SHOWN) if shown is None else list(shown)
    if len(layers) != len(heat) or any(not 0 <= place < len(heat) for place in places):
        raise ModaValueError(
            f"heat has {len(heat)} layers; as many in layers, and shown below it, wanted; got {places}"
        )
    theme = theme_of(style)
    maps = [("mean over layers", heat.mean(axis=0)), *((f"layer {layers[place]}", heat[place]) for place in places)]
    with drawing(theme):
        backdrop = None if picture is None else grey(picture)
        height = (
            SIDE * heat.shape[1] / heat.shape[2] if backdrop is None else SIDE * backdrop.shape[0] / backdrop.shape[1]
        )
        figure = new_figure(SIDE * (len(maps) + (backdrop is not None)) + 0.9, height + 0.75)
        panels = figure.subplots(1, len(maps) + (backdrop is not None), squeeze=False)[0]
        if backdrop is not None:
            panels[0].imshow(backdrop, cmap="gray", vmin=0, vmax=1, interpolation="none")
            _bare(panels[0], "what the model saw")
            panels = panels[1:]
        top = max(1.0, max(over_even(values).max() for _, values in maps))
        for axes, (title, values) in zip(panels, maps, strict=True):
            drawn = draw_heat(axes, values, backdrop, top)
            _bare(axes, f"{title}\n{values.sum():.1%} of the mass")
        bar = figure.colorbar(drawn, ax=list(panels), shrink=0.9, pad=0.02, aspect=14)
        bar.set_label("× an even share")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
    return figure


def spread(count: int, wanted: int) -> list[int]:
    """So many places from the first to the last of ``count``, evenly."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(wanted, count))})


def over_even(values: np.ndarray) -> np.ndarray:
    """Each token's mass over what it would have if all of the image had the same; 0 where there is none."""
    mean = values.mean()
    return values / mean if mean > 0 else np.zeros_like(values)


def grey(picture: Any) -> np.ndarray:
    """(H, W) between 0 and 1."""
    pixels = np.asarray(picture, dtype=np.float64)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] @ [0.299, 0.587, 0.114]
    if pixels.ndim != 2 or pixels.size == 0:
        raise ModaValueError(f"picture has shape {np.shape(picture)}; (H, W) or (H, W, 3) wanted")
    low, high = pixels.min(), pixels.max()
    return (pixels - low) / (high - low) if high > low else np.full(pixels.shape, 0.5)


def draw_heat(axes: Axes, values: np.ndarray, backdrop: np.ndarray | None, top: float) -> Any:
    """One map over the picture; returns what a colour bar is made for."""
    from matplotlib import colormaps

    relative = over_even(values)
    # The picture shows through where little attention lies.
    opacity = None if backdrop is None else 0.08 + 0.77 * np.sqrt(np.clip(relative / top, 0, 1))
    extent = None
    if backdrop is not None:
        extent = (-0.5, backdrop.shape[1] - 0.5, backdrop.shape[0] - 0.5, -0.5)
        axes.imshow(backdrop, cmap="gray", vmin=0, vmax=1, interpolation="none")
    return axes.imshow(
        relative, cmap=colormaps["inferno"], vmin=0, vmax=top, alpha=opacity, interpolation="none", extent=extent
    )


def _bare(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8.5, weight="normal")
    for spine in axes.spines.values():
        spine.set_visible(True)
