"""How results are printed: lines for the console while they come in, tables in Markdown from a record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .cases import DENSE, SDPA, STOCK

PEERS = (SDPA, STOCK, DENSE)
#: Above this share of the processors' time, what other processes do shows in the ratios.
NOISY = 0.05


def ratio(row: dict[str, Any], peer: str) -> float | None:
    """A peer's time over ours."""
    times = row["times_ms"]
    return times[peer] / times["moda_attn"] if peer in times else None


def misses(row: dict[str, Any]) -> list[str]:
    """The goals of a row that it misses, in words."""
    if "value" in row:
        return [f"{row['name']}: {number(row['value'])} {row['unit']}"] if row["met"] is False else []
    name = row["name"]
    return [
        f"{name}: {number(reached)} times {peer}, goal {goal:g}"
        for peer, goal in row["goals"].items()
        if (reached := ratio(row, peer)) is not None and reached < goal
    ]


def race_line(row: dict[str, Any]) -> str:
    """One race on the console."""
    parts = [f"  {row['name']:58s}{milliseconds(row['times_ms']['moda_attn']):>10s}"]
    for peer in PEERS:
        reached, goal = ratio(row, peer), row["goals"].get(peer)
        if reached is not None:
            parts.append(f"{peer} {number(reached):>5s}{verdict(reached, goal):16s}")
    return "  ".join(parts).rstrip() + _noise(row)


def verdict(reached: float, goal: float | None) -> str:
    """What a goal says of a ratio."""
    if goal is None:
        return ""
    return f" (goal {goal:g}, met)" if reached >= goal else f" (goal {goal:g}, MISSED)"


def figure_line(row: dict[str, Any]) -> str:
    """One figure on the console."""
    if row["value"] is None:
        return f"  {row['name']:58s}{'-':>10s}  not on this machine, or not with so many threads"
    return f"  {row['name']:58s}{number(row['value']):>10s} {row['unit']}{goal_of(row)}{_noise(row)}"


def _noise(row: dict[str, Any]) -> str:
    return f"  [{row['others']:.0%} of the machine to others]" if (row["others"] or 0) > NOISY else ""


def goal_of(row: dict[str, Any]) -> str:
    """A figure's goal and whether it is met."""
    if row["met"] is None:
        return ""
    return f" (goal {row['goal']}, {'met' if row['met'] else 'MISSED'})"


def number(value: float) -> str:
    """Three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def milliseconds(value: float) -> str:
    """A time in a unit that suits it."""
    return f"{number(value)} ms" if value >= 0.1 else f"{number(1000 * value)} us"


def headline(record: dict[str, Any]) -> str:
    """The README's table: what each kind of call reaches over all its shapes with grouped heads."""
    lines = [
        "| | ours at N 1024, D 128 | plain `sdpa` | best MODA in stock PyTorch | dense MODA |",
        "|---|---|---|---|---|",
    ]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in record["races"]:
        if row["section"].endswith(("-forward", "-training")) and row["shape"][1] != row["shape"][2]:
            kinds.setdefault(f"{row['dtype']} {row['kind']}", []).append(row)
    for kind, rows in kinds.items():
        ours = next(row["times_ms"]["moda_attn"] for row in rows if row["shape"][3:] == [1024, 128])
        spans = (span(ratio(row, peer) for row in rows) for peer in PEERS)
        lines.append(f"| {kind} | {milliseconds(ours)} | {' | '.join(spans)} |")
    for row in record["races"]:
        if row["section"] == "decode":
            what = f"{row['dtype']} decode, {row['shape'][3]} keys, batch {row['shape'][0]}"
            spans = (span([ratio(row, peer)]) for peer in PEERS)
            lines.append(f"| {what} | {milliseconds(row['times_ms']['moda_attn'])} | {' | '.join(spans)} |")
    return "\n".join(lines)


def span(ratios: Iterable[float | None]) -> str:
    """From the least to the largest ratio."""
    known = sorted(value for value in ratios if value is not None)
    if not known:
        return "–"
    low, high = number(known[0]), number(known[-1])
    return low if low == high else f"{low} – {high}"


def table(record: dict[str, Any]) -> str:
    """Every row of a record, for docs/performance.md."""
    lines = ["| | B, Hq, Hkv, N, D | ours | sdpa | sdpa_moda | eager_moda |", "|---|---|---|---|---|---|"]
    for row in record["races"]:
        isa = f", {row['isa']}" if row["isa"] else ""
        cells = [f"{row['dtype']} {row['kind']}{isa}", ", ".join(map(str, row["shape"]))]
        cells.append(milliseconds(row["times_ms"]["moda_attn"]))
        cells += [_cell(ratio(row, peer), row["goals"].get(peer)) for peer in PEERS]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | measured | goal |", "|---|---|---|"]
    for row in record["figures"]:
        value = "not on this machine" if row["value"] is None else f"{number(row['value'])} {row['unit']}"
        value = f"**{value}**" if row["met"] is False else value
        lines.append(f"| {row['name']} | {value} | {row['goal']} |")
    return "\n".join(lines)


def _cell(reached: float | None, goal: float | None) -> str:
    if reached is None:
        return "–"
    if goal is None:
        return number(reached)
    text = f"{number(reached)} of {goal:g}"
    return text if reached >= goal else f"**{text}**"
