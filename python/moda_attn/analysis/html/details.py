"""The sections of a page about single inputs and about the keys: pictures, generated answers, the gap between keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ...config import VISION
from ..plot.gap import TITLES, draw_gap
from ..plot.generation import draw_generation, shares_of
from ..plot.image import SHOWN, over_even, spread
from ..plot.style import LIGHT
from . import tables, words
from .blocks import drawing, figure, panels, section, text
from .figures import heat_panel, heat_scale, picture_definition

if TYPE_CHECKING:
    from ..keyspace import KeySpace
    from .page import Answer, SeenImage

#: Inches, as in `sections`.
GENERATION, GAP = (3.9, 3.1), (3.9, 2.7)
#: An answer of more words takes a whole line on a desktop, and scrolls in its own box on a phone.
NARROW, WIDE = 14, 8.4


def of_images(images: Sequence[SeenImage]) -> list[str]:
    """The pictures with the attention that lies on them."""
    if not images:
        return []
    parts = [text(words.IMAGE)]
    for number, seen in enumerate(images):
        maps = {name: _maps(heat, seen.layers) for name, heat in seen.heat.items()}
        top = max(1.0, max(over_even(values).max() for shown in maps.values() for _, values in shown))
        parts += [_one_image(number, seen, maps, top), _scale(top)]
    return [section("On the image", parts)]


def of_answers(answers: Sequence[Answer]) -> list[str]:
    """Where the tokens of generated answers looked."""
    figures = []
    for place, answer in enumerate(answers):
        image, chance = shares_of(answer.balance)[..., VISION]
        if not len(image):
            continue
        alt = (
            f"{len(image)} generated tokens; mass on the image {image[0]:.0%} for the first and {image[-1]:.0%} for the"
            f" last, {image.mean():.0%} on average, where chance gives {chance.mean():.0%}"
        )
        wide = len(image) > NARROW
        size = (WIDE if wide else GENERATION[0], GENERATION[1])
        draw = partial(draw_generation, balance=answer.balance, theme=LIGHT, words=answer.words)
        drawn = drawing(f"g{place}", size, (answer.title, alt), draw)
        figures.append(drawn.replace("<figure>", '<figure class="wide" tabindex="0">', 1) if wide else drawn)
    return [section("Word by word", [text(words.GENERATION), panels(figures)])] if figures else []


def of_keys(spaces: Mapping[str, KeySpace]) -> list[str]:
    """How far apart the modalities' keys lie."""
    if not spaces:
        return []
    figures = []
    for place, (model, space) in enumerate(spaces.items()):
        for name, title in TITLES.items():
            means = {stage: found.value for stage, found in space.summary(name).items() if stage != "change"}
            known = ", ".join(f"{stage} alignment {mean:.2f}" for stage, mean in means.items() if np.isfinite(mean))
            alt = f"mean over layers and heads: {known or 'no keys of one of the modalities'}"
            draw = partial(draw_gap, space=space, name=name, theme=LIGHT)
            heading = f"{title[0].upper() + title[1:]} · {model}"
            figures.append(drawing(f"k{place}{name}", GAP, (heading, alt), draw, legend=space.after is not None))
    many = any(space.inputs > 1 for space in spaces.values())
    parts = [text(words.KEYS, words.BANDS if many else ""), tables.of_keys(spaces), panels(figures, "three")]
    return [section("Key space", parts)]


def _maps(heat: np.ndarray, layers: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    return [
        ("mean over layers", heat.mean(axis=0)),
        *((f"layer {layers[place]}", heat[place]) for place in spread(len(heat), SHOWN)),
    ]


def _one_image(number: int, seen: SeenImage, maps: dict[str, list[tuple[str, np.ndarray]]], top: float) -> str:
    definition, size, name = "", None, None
    if seen.picture is not None:
        name = f"picture{number}"
        definition, size = picture_definition(seen.picture, name)
    parts = [definition, f"<h3>{escape(seen.caption)}</h3>"]
    if seen.chance is not None:
        parts.append(text(f"At chance {seen.chance:.1%} of the attention would lie on it."))
    for model, shown in maps.items():
        figures = []
        for title, values in shown:
            relative = over_even(values)
            row, column = (int(i) + 1 for i in np.unravel_index(np.argmax(relative), relative.shape))
            alt = (
                f"{model}, {title}: most attention at row {row} of {relative.shape[0]}, column {column} of"
                f" {relative.shape[1]}, {relative.max():.1f} times an even share"
            )
            svg = heat_panel(relative, top, size or (relative.shape[1], relative.shape[0]), name, alt)
            figures.append(figure(svg, f"{title}: {values.sum():.1%} of the attention"))
        parts.append(f'<p><b>{escape(model)}</b></p><div class="maps">{"".join(figures)}</div>')
    return "".join(parts)


def _scale(top: float) -> str:
    return (
        f'<div class="scale">0 <span style="background: {heat_scale()}" role="img" aria-label="colour scale from 0 to'
        f' {top:.1f} times an even share"></span> {top:.1f} × an even share of what lies on the image</div>'
    )
