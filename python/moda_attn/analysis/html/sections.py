"""The parts of a page, each a piece of HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from ...config import VISION
from ..compare import BalanceComparison
from ..plot.gap import TITLES, draw_gap, heads_of
from ..plot.generation import draw_generation, shares_of
from ..plot.heads import draw_heads
from ..plot.image import SHOWN, over_even, spread
from ..plot.measures import draw_measures
from ..plot.profile import draw_profile, title_of
from ..plot.style import LIGHT, legend_above
from ..table import MEASURE_NAMES, value_text
from . import tables, words
from .figures import heat_panel, heat_scale, panel, picture_definition

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..keyspace import KeySpace
    from ..report import BalanceReport, RowBalance
    from .page import Answer, SeenImage

#: Inches; at their natural size on a desktop, and still readable at the width of a phone.
PROFILE, HEADS, GENERATION = (3.9, 2.7), (3.9, 3.0), (3.9, 3.1)

#: An answer of more words takes a whole line on a desktop, and scrolls in its own box on a phone.
NARROW, WIDE = 14, 8.4


def of_report(report: BalanceReport) -> list[str]:
    """At a glance, the layers, the heads of one model."""
    return [
        _section("At a glance", [tables.of_measures(report)]),
        _section("Layer by layer", [_text(words.PROFILE, _bands(report.every)), _panels(_profiles(report, "p"))]),
        _section("Head by head", [_text(words.HEADS), _panels(_heads(report, "h"))]),
    ]


def of_comparison(result: BalanceComparison) -> list[str]:
    """The same of two models, side by side."""
    sentences = "".join(f"<li>{escape(words.verdict(row, result.names))}</li>" for row in result.rows)
    sample = "the same inputs" if result.paired else "different inputs"
    caption = f"Hollow: {result.names[0]}; full: {result.names[1]}; measured on {sample}."
    both = (("a", result.before, result.names[0]), ("b", result.after, result.names[1]))
    profiles = _taking_turns(*(_profiles(report, f"p{key}", name) for key, report, name in both))
    heads = _taking_turns(*(_heads(report, f"h{key}", name) for key, report, name in both))
    glance = [
        _panels([_figure(_measures(result), caption), f'<ul class="list">{sentences}</ul>']),
        tables.of_changes(result),
    ]
    return [
        _section("At a glance", glance),
        _section(
            "Layer by layer",
            [_text(words.PROFILE, _bands([*result.before.every, *result.after.every])), _panels(profiles)],
        ),
        _section("Head by head", [_text(words.HEADS), _panels(heads)]),
    ]


def of_images(images: Sequence[SeenImage]) -> list[str]:
    """The pictures with the attention that lies on them."""
    if not images:
        return []
    parts = [_text(words.IMAGE)]
    for number, seen in enumerate(images):
        maps = {name: _maps(heat, seen.layers) for name, heat in seen.heat.items()}
        top = max(1.0, max(over_even(values).max() for shown in maps.values() for _, values in shown))
        parts += [_one_image(number, seen, maps, top), _scale(top)]
    return [_section("On the image", parts)]


def of_answers(answers: Sequence[Answer]) -> list[str]:
    """Where the tokens of generated answers looked."""
    figures = []
    for place, answer in enumerate(answers):
        image, chance = shares_of(answer.balance)[..., VISION]
        count = len(image)
        first, last = (image[0], image[-1]) if count else (0.0, 0.0)
        alt = (
            f"{count} generated tokens; mass on the image {first:.0%} for the first and {last:.0%} for the last,"
            f" {image.mean() if count else 0:.0%} on average, where chance gives {chance.mean() if count else 0:.0%}"
        )

        def draw(axes: Axes, answer: Answer = answer) -> None:
            draw_generation(axes, answer.balance, LIGHT, answer.words)
            legend_above([axes])

        wide = count > NARROW
        size = (WIDE if wide else GENERATION[0], GENERATION[1])
        figure = _titled(f"g{place}", size, (answer.title, alt), draw)
        figures.append(figure.replace("<figure>", '<figure class="wide" tabindex="0">', 1) if wide else figure)
    return [_section("Word by word", [_text(words.GENERATION), _panels(figures)])] if figures else []


def of_keys(spaces: Mapping[str, KeySpace]) -> list[str]:
    """How far apart the modalities' keys lie."""
    figures = []
    for place, (model, space) in enumerate(spaces.items()):
        for name, title in TITLES.items():
            stages = heads_of(space, name)
            means = (
                f"{stage} {np.nanmean(values):.2f}" for stage, values in stages.items() if not np.isnan(values).all()
            )
            alt = f"mean over layers and heads: {', '.join(means) or 'no keys of one of the modalities'}"

            def draw(axes: Axes, space: KeySpace = space, stages: dict[str, np.ndarray] = stages) -> None:
                draw_gap(axes, space.layers, stages, LIGHT)
                legend_above([axes])

            figures.append(
                _titled(f"k{place}{name}", PROFILE, (f"{title[0].upper() + title[1:]} · {model}", alt), draw)
            )
    return (
        [_section("Key space", [_text(words.KEYS), f'<div class="panels three">{"".join(figures)}</div>'])]
        if figures
        else []
    )


def traps() -> str:
    """How not to read the page."""
    items = "".join(f"<li><b>{escape(head)}</b> {escape(rest)}</li>" for head, rest in words.TRAPS)
    return _section("How to read this", [f'<ul class="list">{items}</ul>'])


def numbers(balance: BalanceReport | BalanceComparison) -> str:
    """The masses of every layer, folded away."""
    if isinstance(balance, BalanceComparison):
        reports = [*zip(balance.names, (balance.before, balance.after), strict=True)]
    else:
        reports = [("", balance)]
    all_tables = [
        tables.of_layers(row, report.layers, _title(row, name)) for name, report in reports for row in report.every
    ]
    return _section("Every layer", [f"<details><summary>Show the masses</summary>{''.join(all_tables)}</details>"])


def _section(title: str, parts: Iterable[str]) -> str:
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _text(*sentences: str) -> str:
    return f"<p>{escape(''.join(sentences))}</p>"


def _panels(figures: Iterable[str]) -> str:
    return f'<div class="panels">{"".join(figures)}</div>'


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _bands(rows: Iterable[RowBalance]) -> str:
    return words.BANDS if any(row.inputs > 1 for row in rows) else ""


def _profiles(report: BalanceReport, key: str, name: str = "") -> list[str]:
    figures = []
    for place, row in enumerate(report.every):
        alt = (
            f"own modality {row.self_mass[0]:.0%} in the first layer and {row.self_mass[-1]:.0%} in the last,"
            f" others {row.cross_mass[0]:.0%} and {row.cross_mass[-1]:.0%},"
            f" pseudo-scores {row.pseudo_mass[0]:.0%} and {row.pseudo_mass[-1]:.0%}"
        )

        def draw(axes: Axes, row: RowBalance = row) -> None:
            draw_profile(axes, report.layers, row, LIGHT)
            legend_above([axes])

        figures.append(_titled(f"{key}{place}", PROFILE, (_title(row, name), alt), draw))
    return figures


def _heads(report: BalanceReport, key: str, name: str = "") -> list[str]:
    figures = []
    for place, row in enumerate(report.every):
        own = row.mass[..., row.modality]
        lead = own - (row.mass[..., :-1].sum(-1) - own)
        layer, head = (int(index) for index in np.unravel_index(np.nanargmin(lead), lead.shape))
        alt = (
            f"map of {lead.shape[0]} layers and {lead.shape[1]} heads; the head that looks most at other modalities is"
            f" head {head} of layer {report.layers[layer]}, own less others {lead[layer, head]:.2f}"
        )

        def draw(axes: Axes, row: RowBalance = row) -> None:
            draw_heads(axes, report.layers, row, LIGHT)

        figures.append(_titled(f"{key}{place}", HEADS, (_title(row, name), alt), draw))
    return figures


def _title(row: RowBalance, name: str) -> str:
    return f"{title_of(row)} · {name}" if name else title_of(row)


def _titled(key: str, size: tuple[float, float], title_and_alt: tuple[str, str], draw: Callable[[Axes], None]) -> str:
    title, alt = title_and_alt
    picture = panel(key, size, f"{title}: {alt}", draw)
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{picture}</figure>"


def _taking_turns(one: Sequence[str], other: Sequence[str]) -> list[str]:
    return [figure for pair in zip_longest(one, other, fillvalue="<div></div>") for figure in pair]


def _measures(result: BalanceComparison) -> str:
    alt = "; ".join(
        f"{title_of(row.before)} {MEASURE_NAMES[name]} from {value_text(name, getattr(row.before, name))} to"
        f" {value_text(name, getattr(row.after, name))}"
        for row in result.rows
        for name in ("disparity", "relative_disparity", "pseudo_share")
    )
    return panel("m", (4.0, 0.75 + 0.86 * len(result.rows)), alt, lambda axes: draw_measures(axes, result, LIGHT))


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
            figures.append(_figure(svg, f"{title}: {values.sum():.1%} of mass"))
        parts.append(f'<p><b>{escape(model)}</b></p><div class="maps">{"".join(figures)}</div>')
    return "".join(parts)


def _scale(top: float) -> str:
    return (
        f'<div class="scale">0 <span style="background: {heat_scale()}" role="img" aria-label="colour scale from 0 to'
        f' {top:.1f} times an even share"></span> {top:.1f} × an even share</div>'
    )
