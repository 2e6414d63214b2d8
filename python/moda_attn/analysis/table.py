"""Reports as plain text, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .measures import FACTORS

if TYPE_CHECKING:
    from .compare import BalanceComparison
    from .intervals import Change
    from .report import BalanceReport, RowBalance

MEASURE_NAMES = {
    "disparity": "disparity",
    "relative_disparity": "relative disparity",
    "pseudo_share": "pseudo share",
    "lift": "cross lift",
    "decay": "decay γ",
    "error": "E_DDA",
}


def balance_table(report: BalanceReport) -> str:
    """Every layer of every kind of query rows, and the measures with what is known of their errors."""
    lines = [f"Attention balance, {'patched' if report.patched else 'unpatched'} model, {len(report.layers)} layers"]
    lines += [f"not measured: {sentence}" for sentence in unmeasured_layers(report.unmeasured)]
    for row in report.every:
        inputs = f" of {row.inputs} inputs" if row.inputs > 1 else ""
        lines += ["", f"{row.name}: {row.rows} query rows{inputs}", "   layer    self   cross  pseudo  |self-cross|"]
        masses = zip(report.layers, row.self_mass, row.cross_mass, row.pseudo_mass, strict=True)
        lines += [_masses(layer, own, cross, pseudo, abs(own - cross)) for layer, own, cross, pseudo in masses]
        chance = row.chance
        own, cross = (sum(by_layer) / len(by_layer) for by_layer in (chance.self_mass, chance.cross_mass))
        lines += [_masses("chance", own, cross, 0.0, chance.disparity), *_factors(row), _shares(row)]
    return "\n".join(lines)


def unmeasured_layers(unmeasured: Mapping[int, str]) -> list[str]:
    """ "layers 3 and 8: the reason", one text for each reason."""
    texts = []
    for reason in dict.fromkeys(unmeasured.values()):
        *most, last = (str(layer) for layer, why in unmeasured.items() if why == reason)
        which = f"layers {', '.join(most)} and {last}" if most else f"layer {last}"
        texts.append(f"{which}: {reason}")
    return texts


def _masses(layer: int | str, own: float, cross: float, pseudo: float, gap: float) -> str:
    return f"  {layer:>6}  {own:6.3f}  {cross:6.3f}  {pseudo:6.3f}  {gap:12.3f}"


def _shares(row: RowBalance) -> str:
    titles = {"disparity": "disparity", "relative_disparity": "relative", "pseudo_share": "pseudo share"}
    cells = [
        f"{title} {getattr(row, name):.3f}{_bracket(row.intervals[name], '.3f')}" for name, title in titles.items()
    ]
    return "  " + ", ".join(cells)


def _factors(row: RowBalance) -> list[str]:
    fit = row.decay_fit
    cells = (
        ("decay", "decay", ".3f", (fit.low, fit.high)),
        ("E_DDA", "error", ".2e", (fit.error_low, fit.error_high)),
    )
    lines = [f"  cross lift {row.lift:.3f}{_bracket(row.intervals['lift'], '.3f')}"]
    for title, name, form, by_fit in cells:
        over = _bracket(row.intervals[name], form)
        both = f"{_bracket(by_fit, form)} by the fit,{over} over inputs" if over else _bracket(by_fit, form)
        lines.append(f"  {title} {getattr(row, name):{form}}{both}")
    return lines


def comparison_table(comparison: BalanceComparison) -> str:
    """The paper's table: each measure before and after, always all of them, with the change and its interval."""
    before, after = comparison.names
    inputs = max(row.before.inputs for row in comparison.rows)
    sample = f"{inputs} inputs, {'paired' if comparison.paired else 'not paired'}" if inputs > 1 else "one input"
    lines = [f"Attention balance, {before} → {after}; {sample}; in brackets 95 % intervals over the inputs"]
    left_out = [*unmeasured_layers(comparison.before.unmeasured), *unmeasured_layers(comparison.after.unmeasured)]
    lines += [f"not measured: {layers}" for layers in dict.fromkeys(left_out)]
    width = max(len(row.name) for row in comparison.rows)
    for row in comparison.rows:
        lines.append("")
        for place, (name, title) in enumerate(MEASURE_NAMES.items()):
            one, other = (value_text(name, getattr(balance, name)) for balance in (row.before, row.after))
            label = f"  {row.name if place == 0 else '':<{width}}  {title:<18}"
            lines.append(f"{label}  {one:>9} → {other:>9}   {change_text(name, row.changes[name])}")
        one, other = (value_text("disparity", balance.chance.disparity) for balance in (row.before, row.after))
        lines.append(f"  {'':<{width}}  {'chance disparity':<18}  {one:>9} → {other:>9}")
    return "\n".join(lines)


def value_text(name: str, value: float) -> str:
    """A share in per cent, a factor as it is, a dash where there is none."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.2f} %" if name not in FACTORS else f"{value:.2e}" if name == "error" else f"{value:.3f}"


def change_text(name: str, change: Change) -> str:
    """Points for shares, a ratio for factors; the interval where there is one."""
    if math.isnan(change.value):
        return "–"
    if name in FACTORS:
        return f"× {change.value:.3g}{_bracket(change[1:], '.3g')}"
    low, high = 100 * change.low, 100 * change.high
    return f"{100 * change.value:+.2f} points{_bracket((low, high), '+.2f')}"


def _bracket(interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return "" if math.isnan(low) or math.isnan(high) else f" [{low:{form}}, {high:{form}}]"
