"""The sections of a page about the balance itself: at a glance, by layer, by head, how to read it, every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from ..compare import BalanceComparison
from ..plot.heads import draw_heads
from ..plot.measures import draw_measures
from ..plot.profile import draw_profile, title_of
from ..plot.style import LIGHT
from ..table import MEASURE_NAMES, unmeasured_layers, value_text
from . import tables, words
from .blocks import bullets, drawing, figure, panels, section, text
from .figures import panel

if TYPE_CHECKING:
    from ..report import BalanceReport, RowBalance

#: Inches; at their natural size on a desktop, and still readable at the width of a phone.
PROFILE, HEADS = (3.9, 2.7), (3.9, 3.0)


def of_report(report: BalanceReport) -> list[str]:
    """At a glance, the layers, the heads of one model."""
    glance = [
        *_unmeasured({"": report}),
        bullets(words.summary(row) for row in report.every),
        tables.of_measures(report),
    ]
    return [
        section("At a glance", glance),
        section("Layer by layer", [text(words.PROFILE, _bands(report.every)), panels(_profiles(report, "p"))]),
        section("Head by head", [text(words.HEADS), panels(_heads(report, "h"))]),
    ]


def of_comparison(result: BalanceComparison) -> list[str]:
    """The same of two models, side by side."""
    sample = "the same inputs" if result.paired else "different inputs"
    caption = f"Hollow: {result.names[0]}; full: {result.names[1]}; measured on {sample}."
    both = (("a", result.before, result.names[0]), ("b", result.after, result.names[1]))
    profiles = _taking_turns(*(_profiles(report, f"p{key}", name) for key, report, name in both))
    heads = _taking_turns(*(_heads(report, f"h{key}", name) for key, report, name in both))
    verdicts = bullets(words.verdict(row, result.names) for row in result.rows)
    glance = [
        *_unmeasured({name: report for _, report, name in both}),
        panels([figure(_measures(result), caption), verdicts]),
        tables.of_changes(result),
    ]
    bands = _bands([*result.before.every, *result.after.every])
    return [
        section("At a glance", glance),
        section("Layer by layer", [text(words.PROFILE, bands), panels(profiles)]),
        section("Head by head", [text(words.HEADS), panels(heads)]),
    ]


def traps() -> str:
    """How not to read the page."""
    items = "".join(f"<li><b>{escape(head)}</b> {escape(rest)}</li>" for head, rest in words.TRAPS)
    return section("How to read this", [f'<ul class="list">{items}</ul>'])


def numbers(balance: BalanceReport | BalanceComparison) -> str:
    """The masses of every layer, folded away."""
    if isinstance(balance, BalanceComparison):
        reports = [*zip(balance.names, (balance.before, balance.after), strict=True)]
    else:
        reports = [("", balance)]
    all_tables = [
        tables.of_layers(row, report.layers, _title(row, name)) for name, report in reports for row in report.every
    ]
    return section("Every layer", [f"<details><summary>Show the masses</summary>{''.join(all_tables)}</details>"])


def _unmeasured(reports: Mapping[str, BalanceReport]) -> list[str]:
    """What is said of layers that are not measured; once where all reports agree."""
    said = {name: "; ".join(unmeasured_layers(report.unmeasured)) for name, report in reports.items()}
    if len(set(said.values())) == 1:
        said = {"": next(iter(said.values()))}
    return [
        text(f"Not measured{f' of {name}' if name else ''}: {layers}.", words.UNMEASURED)
        for name, layers in said.items()
        if layers
    ]


def _bands(rows: Iterable[RowBalance]) -> str:
    return words.BANDS if any(row.inputs > 1 for row in rows) else ""


def _profiles(report: BalanceReport, key: str, name: str = "") -> list[str]:
    figures = []
    for place, row in enumerate(report.every):
        alt = (
            f"own modality {row.self_mass[0]:.0%} in the first layer and {row.self_mass[-1]:.0%} in the last,"
            f" others {row.cross_mass[0]:.0%} and {row.cross_mass[-1]:.0%}, where chance gives them"
            f" {row.chance.cross_mass[0]:.0%} and {row.chance.cross_mass[-1]:.0%};"
            f" pseudo-scores {row.pseudo_mass[0]:.0%} and {row.pseudo_mass[-1]:.0%}"
        )
        draw = partial(draw_profile, layers=report.layers, row=row, theme=LIGHT)
        figures.append(drawing(f"{key}{place}", PROFILE, (_title(row, name), alt), draw))
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
        draw = partial(draw_heads, layers=report.layers, row=row, theme=LIGHT)
        figures.append(drawing(f"{key}{place}", HEADS, (_title(row, name), alt), draw, legend=False))
    return figures


def _title(row: RowBalance, name: str) -> str:
    return f"{title_of(row)} · {name}" if name else title_of(row)


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
