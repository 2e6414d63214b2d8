"""The numbers of a page, each with a sentence on how to read it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..measures import FACTORS, MEASURES
from ..plot.gap import TITLES
from ..table import MEASURE_NAMES
from . import words

if TYPE_CHECKING:
    from ..compare import BalanceComparison, RowComparison
    from ..intervals import Change
    from ..keyspace import KeySpace
    from ..report import BalanceReport, RowBalance


def of_measures(report: BalanceReport) -> str:
    """Every measure of every kind of query rows, with the intervals of the fit and over the inputs."""
    bodies = []
    for name in MEASURES:
        lines = []
        for row in report.every:
            intervals = _interval(name, row.intervals[name], " over the inputs")
            fit = row.decay_fit
            by_fit = {"decay": (fit.low, fit.high), "error": (fit.error_low, fit.error_high)}
            if name in by_fit:
                intervals = _interval(name, by_fit[name], " by the fit") + intervals
            cells = f"<td>{_strong(_value(name, getattr(row, name)))}{intervals}</td><td>{_at_chance(name, row)}</td>"
            lines.append(_row(row.name.capitalize(), cells))
        bodies.append(_body(name, 3, lines))
    caption = f"{_counts(report.every)}. Below the values: 95 % intervals"
    return _table(caption, ("queries of", "value", "at chance"), bodies)


def of_changes(result: BalanceComparison) -> str:
    """Every measure before and after, and its change."""
    bodies = []
    for name in MEASURES:
        lines = []
        for row in result.rows:
            values = (_strong(_value(name, getattr(balance, name))) for balance in (row.before, row.after))
            cells = "".join(f"<td>{value}</td>" for value in (*values, _change(name, row.changes[name])))
            lines.append(_row(row.name.capitalize(), cells, _both_at_chance(name, row)))
        bodies.append(_body(name, 4, lines))
    caption = f"{_counts(result.before.every)}. Below the changes: 95 % intervals over the inputs"
    return _table(caption, ("queries of", *result.names, "change"), bodies)


def of_layers(row: RowBalance, layers: Sequence[int], title: str) -> str:
    """The masses of every layer."""
    masses = (row.self_mass, row.cross_mass, row.pseudo_mass, row.chance.self_mass, row.chance.cross_mass)
    lines = [
        _row(str(layer), "".join(f"<td>{mass:.3f}</td>" for mass in of_layer))
        for layer, *of_layer in zip(layers, *masses, strict=True)
    ]
    titles = ("layer", "self", "cross", "pseudo", "self at chance", "cross at chance")
    return _table(title, titles, [f"<tbody>{''.join(lines)}</tbody>"])


def of_keys(spaces: Mapping[str, KeySpace]) -> str:
    """The numbers of the key space, means over layers and heads, before and after alignment."""
    bodies = []
    for name, title in TITLES.items():
        lines = []
        for model, space in spaces.items():
            found = space.summary(name)
            forms = {"before": ".3f", "after": ".3f", "change": "+.3f"}
            cells = "".join(f"<td>{_distance(found.get(stage), form)}</td>" for stage, form in forms.items())
            lines.append(_row(model, cells))
        heading = f'<th class="note" scope="rowgroup" colspan="4"><b>{escape(title)}</b></th>'
        bodies.append(f"<tbody><tr>{heading}</tr>{''.join(lines)}</tbody>")
    counts = sorted({space.inputs for space in spaces.values()})
    inputs = " and ".join(f"{count:,}" for count in counts) + (" inputs" if counts[-1] > 1 else " input")
    caption = f"Text against vision, means over layers, heads and {inputs}. Below: 95 % intervals over the inputs"
    return _table(caption, ("keys of", "before", "after", "change"), bodies)


def _distance(found: Change | None, form: str) -> str:
    if found is None or math.isnan(found.value):
        return "–"
    value, low, high = (f"{part:{form}}".replace("-", "−") for part in found)
    return _strong(value) + ("" if math.isnan(found.low) else f'<span class="interval">{low} to {high}</span>')


def _at_chance(name: str, row: RowBalance) -> str:
    """What even attention would give; a dash where that says nothing."""
    known = {"disparity": row.chance.disparity, "relative_disparity": row.chance.relative_disparity, "lift": 1.0}
    return _value(name, known[name]) if name in known else "–"


def _both_at_chance(name: str, row: RowComparison) -> str:
    """The same of two models; once where they agree, as on the same inputs."""
    before, after = (_at_chance(name, balance) for balance in (row.before, row.after))
    if (before, after) == ("–", "–"):
        return ""
    return f"at chance {before}" if before == after else f"at chance {before} → {after}"


def _counts(rows: Iterable[RowBalance]) -> str:
    counts = [f"{row.name} {row.rows:,}" for row in rows]
    inputs = max(row.inputs for row in rows)
    return f"Query rows of {f'{inputs:,} inputs' if inputs > 1 else 'one input'}: {', '.join(counts)}"


def _table(caption: str, titles: Sequence[str], bodies: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    opening = f'<table class="of{len(titles)}"><caption>{escape(caption)}</caption>'
    return f"{opening}<thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"


def _body(name: str, width: int, lines: Iterable[str]) -> str:
    heading = f"<b>{escape(MEASURE_NAMES[name])}</b> {escape(words.OF_MEASURE[name])}"
    return f'<tbody><tr><th class="note" scope="rowgroup" colspan="{width}">{heading}</th></tr>{"".join(lines)}</tbody>'


def _row(title: str, cells: str, note: str = "") -> str:
    below = f'<span class="interval">{note}</span>' if note else ""
    return f'<tr><th scope="row">{escape(title)}{below}</th>{cells}</tr>'


def _strong(text: str) -> str:
    return f'<span class="value">{text}</span>'


def _value(name: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:.2f}\N{NO-BREAK SPACE}%" if name not in FACTORS else _factor(value)


def _factor(value: float) -> str:
    """Three digits; two and a power of ten where the number is far from 1."""
    if math.isnan(value) or value == 0 or 1e-3 <= value < 1e4:
        return f"{value:.3f}" if 0.1 <= value < 10 else f"{value:.3g}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}·10<sup>{int(power)}</sup>".replace("-", "−")


def _interval(name: str, interval: tuple[float, float], source: str) -> str:
    if any(map(math.isnan, interval)):
        return ""
    low, high = interval
    return f'<span class="interval">{_value(name, low)} – {_value(name, high)}{source}</span>'


def _change(name: str, change: Change) -> str:
    if math.isnan(change.value):
        return "–"
    if name in FACTORS:
        value, low, high = (f"×\N{NO-BREAK SPACE}{_factor(part)}" for part in change)
    else:
        value, low, high = (f"{100 * part:+.2f}".replace("-", "−") for part in change)
        value += " points"
    ends = "" if math.isnan(change.low) else f'<span class="interval">{low} to {high}</span>'
    return _strong(value) + ends
