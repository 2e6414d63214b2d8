"""One picture of a demo run: digits and answers, accuracy, attention balance, and the leak."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import KIND_TITLES, KINDS
from .leak import CHANCE, LOSS_FLOOR

if TYPE_CHECKING:
    from .run import DemoRun

INK, MUTED, GRID = "#22272E", "#68707C", "#E4E7EC"
PLAIN, MODA, LEAKY = "#6C7A91", "#0B7A75", "#D1602A"
WRONG = "#B3261E"
ANSWERERS = (("unpatched", "unpatched", PLAIN), ("moda", "MODA", MODA), ("leaky", 'with "all"', LEAKY))
SELF, CROSS, PSEUDO = "#2F5D8A", "#E3A23C", "#D5DAE1"
# Any: matplotlib types the keys as the literal names of its newest release.
STYLE: dict[Any, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def draw(run: DemoRun, path: Path) -> None:
    """Writes the picture of ``run`` to ``path`` (PNG)."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 11.2), facecolor="white")
        FigureCanvasAgg(figure)
        title = "A small LLaVA reads handwritten digits, without and with MODA attention"
        figure.text(0.045, 0.965, title, fontsize=16, weight="bold", va="center")
        figure.text(0.045, 0.94, _subtitle(run), fontsize=10, color=MUTED, va="center")
        grid = figure.add_gridspec(
            3, 1, height_ratios=[1.08, 1.1, 1.0], left=0.045, right=0.975, top=0.905, bottom=0.055, hspace=0.42
        )
        _draw_answers(figure, grid[0], run)
        middle = grid[1].subgridspec(1, 3, width_ratios=[1.1, 1, 1], wspace=0.27)
        _draw_accuracy(figure.add_subplot(middle[0]), run)
        for column, modality in enumerate((0, 1), start=1):
            _draw_balance(figure.add_subplot(middle[column]), run, modality)
        bottom = grid[2].subgridspec(1, 2, width_ratios=[1.35, 1], wspace=0.15)
        _draw_leak(figure.add_subplot(bottom[0]), run)
        _draw_unknowable(figure.add_subplot(bottom[1]), run)
        figure.savefig(path, dpi=120)


def _subtitle(run: DemoRun) -> str:
    plain, moda = run.models["unpatched"], run.models["moda"]
    facts = (
        f"{plain.parameters:,} parameters unpatched, {moda.parameters:,} with MODA",
        f"{run.recipe.steps} steps of {run.recipe.batch_size}, same seed",
        f"{run.step_ms['unpatched']:.0f} and {run.step_ms['moda']:.0f} ms forward and backward",
        f"{len(run.test)} held-out scans",
    )
    return "  ·  ".join(facts)


def _draw_answers(figure, slot, run: DemoRun) -> None:
    cells = slot.subgridspec(2, len(run.examples), height_ratios=[1.4, 1], hspace=0.04, wspace=0.16)
    for column, example in enumerate(run.examples):
        scan = figure.add_subplot(cells[0, column])
        scan.imshow(run.test.scans[example.question.item], cmap="gray_r", interpolation="nearest")
        scan.set_xticks([])
        scan.set_yticks([])
        for spine in scan.spines.values():
            spine.set(visible=True, color=GRID)
        words = figure.add_subplot(cells[1, column])
        words.axis("off")
        words.text(0.5, 0.82, _wrapped(example.question.text), ha="center", va="center", fontsize=9.5, style="italic")
        for line, (name, label, colour) in enumerate(ANSWERERS):
            height, said = 0.42 - 0.22 * line, example.said[name]
            right = said == example.question.answer
            words.text(0.56, height, label, ha="right", va="center", fontsize=8, color=colour)
            shown, colour = (said, INK) if right else (f"{said} ✗", WRONG)
            words.text(0.62, height, shown, ha="left", va="center", fontsize=9.5, weight="bold", color=colour)


def _wrapped(text: str) -> str:
    """The question as people write it, on two lines when it is long."""
    text = text.replace(" ?", "?").replace(" :", ":").replace(" .", ".")
    if len(text) > 20:
        cut = text.find(" ", len(text) // 2 - 2)
        text = text[:cut] + "\n" + text[cut + 1 :]
    return text


def _draw_accuracy(axes, run: DemoRun) -> None:
    axes.set_title("Right answers on held-out scans, generated")
    for row, kind in enumerate(KINDS):
        ceiling = run.text_only[kind]
        axes.plot([ceiling, ceiling], [row - 0.22, row + 0.3], color=MUTED, lw=1.4, ls=(0, (2, 1.5)), zorder=2)
        for offset, name, colour in ((-0.15, "unpatched", PLAIN), (0.15, "moda", MODA)):
            score = run.models[name].generated[kind]
            low, high = score.interval
            axes.plot([low, high], [row + offset] * 2, color=colour, lw=3.2, alpha=0.45, solid_capstyle="round")
            axes.plot(score.accuracy, row + offset, "o", color=colour, ms=7)
            text = f"{score.accuracy:.1%}"
            _beside(axes, text, (low, row + offset), (-6, 0), "right", "center", colour)
        # Inside the axes, above its row: long names need no margin then.
        axes.text(0.005, row - 0.36, KIND_TITLES[kind], ha="left", va="center")
    axes.set_yticks([])
    axes.set_ylim(len(KINDS) - 0.55, -0.6)
    axes.set_xlim(0, 1.015)
    _percent(axes.xaxis)
    axes.spines["left"].set_visible(False)
    handles = [
        _marker(PLAIN, "unpatched"),
        _marker(MODA, "MODA"),
        _line(MUTED, "best without the picture", (0, (2, 1.5))),
    ]
    _legend_above(axes, handles)


def _draw_balance(axes, run: DemoRun, modality: int) -> None:
    balances = {name: run.models[name].balance.of(modality) for name in ("unpatched", "moda")}
    layers = run.models["moda"].balance.layers
    axes.set_title(f"Where {'text' if modality == 0 else 'image'} queries look, per layer")
    for name, offset in (("unpatched", -0.2), ("moda", 0.2)):
        balance = balances[name]
        left = np.zeros(len(layers))
        places = np.arange(len(layers)) + offset
        for masses, colour in ((balance.self_mass, SELF), (balance.cross_mass, CROSS), (balance.pseudo_mass, PSEUDO)):
            axes.barh(places, masses, 0.36, left=left, color=colour, edgecolor="white", linewidth=0.6)
            left = left + np.asarray(masses)
        for place in places:
            label = "unpatched" if name == "unpatched" else "MODA"
            colour = PLAIN if name == "unpatched" else MODA
            axes.text(-0.012, place, label, ha="right", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(layers)), [f"{layer + 1}" for layer in layers], weight="bold")
    axes.tick_params(axis="y", pad=54)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    _percent(axes.xaxis)
    axes.spines["left"].set_visible(False)
    plain, moda = balances["unpatched"], balances["moda"]
    axes.set_xlabel(
        f"disparity {plain.disparity:.2f} → {moda.disparity:.2f}   relative {plain.relative_disparity:.2f} →"
        f" {moda.relative_disparity:.2f}   pseudo {moda.pseudo_share:.2f}",
        fontsize=8.8,
    )
    _legend_above(
        axes, [_patch(SELF, "own modality"), _patch(CROSS, "other modality"), _patch(PSEUDO, "pseudo-scores")]
    )


def _draw_leak(axes, run: DemoRun) -> None:
    axes.set_title('The released context="all" against context="prompt"')
    columns = (
        ("leaky", "forced", LEAKY, 0.38, '"all", teacher-forced'),
        ("leaky", "generated", LEAKY, 1.0, '"all", generated'),
        ("moda", "forced", MODA, 0.38, '"prompt", teacher-forced'),
        ("moda", "generated", MODA, 1.0, '"prompt", generated'),
    )
    width = 0.19
    for index, (name, view, colour, alpha, _) in enumerate(columns):
        for place, kind in enumerate(KINDS):
            score = getattr(run.models[name], view)[kind]
            x = place + (index - 1.5) * (width + 0.015)
            low, high = score.interval
            axes.bar(x, score.accuracy, width, color=colour, alpha=alpha)
            if view == "generated":
                axes.plot([x, x], [low, high], color=INK, lw=1.1)
            ink = "white" if view == "generated" else INK
            axes.text(x, 0.02, f"{100 * score.accuracy:.0f}", ha="center", va="bottom", fontsize=9, color=ink)
    for place, kind in enumerate(KINDS):
        axes.plot([place - 0.42, place + 0.42], [run.text_only[kind]] * 2, color=INK, lw=1.1, ls=(0, (2, 1.5)))
    axes.set_xticks(range(len(KINDS)), [KIND_TITLES[kind] for kind in KINDS], color=INK)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    _percent(axes.yaxis)
    axes.grid(axis="y", color=GRID)
    axes.spines["left"].set_visible(False)
    handles = [_patch(colour, label, alpha) for _, _, colour, alpha, label in columns]
    _legend_above(axes, [*handles, _line(INK, "without the picture", (0, (2, 1.5)))])


def _draw_unknowable(axes, run: DemoRun) -> None:
    axes.set_title("Trained on random answers nobody can know: the loss")
    steps = max(len(outcome.losses) for outcome in run.unknowable.values())
    for context, colour in (("prompt", MODA), ("all", LEAKY)):
        outcome = run.unknowable[context]
        smooth = _running_mean(outcome.losses, 10)
        axes.plot(np.arange(len(smooth)), smooth, color=colour, lw=2)
        said = f"{outcome.forced.accuracy:.0%} right teacher-forced,\n{outcome.generated.accuracy:.0%} generated"
        _beside(axes, said, (steps, smooth[-1]), (0, 7), "right", "bottom", colour)
    axes.axhline(LOSS_FLOOR, color=INK, lw=1.1, ls=(0, (2, 1.5)))
    note = f"ln 8: the floor without a leak (chance {CHANCE:.1%})"
    _beside(axes, note, (steps, LOSS_FLOOR), (0, -6), "right", "top", INK)
    axes.set_xlim(0, steps)
    axes.set_ylim(0, LOSS_FLOOR * 1.45)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per answer")
    axes.grid(axis="y", color=GRID)
    _legend_above(axes, [_line(LEAKY, 'context="all"', "-"), _line(MODA, 'context="prompt"', "-")])


def _beside(axes, text: str, point, offset, horizontal: str, vertical: str, colour: str) -> None:
    axes.annotate(
        text, point, offset, textcoords="offset points", ha=horizontal, va=vertical, fontsize=9, color=colour
    )  # fmt: skip


def _running_mean(values: list[float], window: int) -> np.ndarray:
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def _percent(axis) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _legend_above(axes, handles) -> None:
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(handles), fontsize=8.3,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.1, borderaxespad=0,
    )  # fmt: skip
    axes.set_title(axes.get_title(loc="left"), pad=24)


def _patch(colour: str, label: str, alpha: float = 1.0):
    from matplotlib.patches import Patch

    return Patch(color=colour, alpha=alpha, linewidth=0, label=label)


def _marker(colour: str, label: str):
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", ls="", color=colour, ms=7, label=label)


def _line(colour: str, label: str, style):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, lw=1.3, ls=style, label=label)
