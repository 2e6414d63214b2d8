"""The demo's findings as a short text for the terminal; every sentence is computed from the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .data import KIND_TITLES, KINDS
from .leak import CHANCE, LOSS_FLOOR

if TYPE_CHECKING:
    from .run import DemoRun

ANSWERERS = (("unpatched", "unpatched"), ("moda", "MODA"), ("leaky", 'with "all"'))


def summary(run: DemoRun) -> str:
    """Accuracy, time, balance, example answers and the leak, in about forty lines."""
    parts = (_accuracy(run), _patching(run), _examples(run), _balance(run), _leak(run))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _accuracy(run: DemoRun) -> list[str]:
    plain, moda = run.models["unpatched"], run.models["moda"]
    lines = [
        f"Right answers on {len(run.test)} held-out scans, generated (Wilson 95 % interval)",
        f"  {'question':<22} {'without the picture':>19}   {'unpatched':<24} MODA",
    ]
    for kind in KINDS:
        cells = [_interval(model.generated[kind]) for model in (plain, moda)]
        lines.append(f"  {KIND_TITLES[kind]:<22} {run.text_only[kind]:>17.1%} *   {cells[0]:<24} {cells[1]}")
    apart = [kind for kind in KINDS if not _overlap(plain.generated[kind].interval, moda.generated[kind].interval)]
    verdict = f"intervals apart for: {', '.join(apart)}" if apart else "the intervals overlap for every question: a tie"
    return [
        *lines,
        "  * the best any rule could do on these very questions from the words alone",
        f"  unpatched against MODA: {verdict}",
        f"  forward and backward of {run.recipe.batch_size} questions, taking turns, median:"
        f" {run.step_ms['unpatched']:.1f} ms unpatched, {run.step_ms['moda']:.1f} ms with MODA",
    ]


def _patching(run: DemoRun) -> list[str]:
    before, after = run.models["unpatched"], run.models["patched_untrained"]
    cells = [f"{kind} {before.generated[kind].accuracy:.1%} -> {after.generated[kind].accuracy:.1%}" for kind in KINDS]
    return ["The trained unpatched model, patched without any further training", "  " + ", ".join(cells)]


def _examples(run: DemoRun) -> list[str]:
    lines = ["Some answers (the first scans of the held-out part)"]
    for example in run.examples:
        question = example.question
        said = "  ".join(f"{label}: {example.said[name]:<5}" for name, label in ANSWERERS)
        lines.append(f"  {question.text:<30} right: {question.answer:<5}  {said}".rstrip())
    return lines


def _balance(run: DemoRun) -> list[str]:
    lines = [
        "Attention mass, mean over layers (own modality / other modality / pseudo-scores)",
        f"  {'query rows':<20} {'model':<10} {'own':>6} {'other':>6} {'pseudo':>7} {'disparity':>10} {'relative':>9}",
    ]
    plain, moda = run.models["unpatched"].balance, run.models["moda"].balance
    for rows in (*plain.modalities, *plain.answers):
        for name, balance in (("unpatched", rows), ("MODA", moda.of(rows.modality, answers_only=rows.answers_only))):
            own, cross = (sum(masses) / len(masses) for masses in (balance.self_mass, balance.cross_mass))
            lines.append(
                f"  {rows.name:<20} {name:<10} {own:6.3f} {cross:6.3f} {balance.pseudo_share:7.3f}"
                f" {balance.disparity:10.3f} {balance.relative_disparity:9.3f}"
            )
    return [*lines, "  The picture comes first: its rows see nothing of another modality but the begin mark."]


def _leak(run: DemoRun) -> list[str]:
    lines = [
        'The released context="all" against context="prompt": the same model, seed and steps',
        f"  {'question':<22} {'all: forced':>12} {'generated':>10}     {'prompt: forced':>14} {'generated':>10}",
    ]
    leaky, moda = run.models["leaky"], run.models["moda"]
    for kind in KINDS:
        lines.append(
            f"  {KIND_TITLES[kind]:<22} {leaky.forced[kind].accuracy:12.1%} {leaky.generated[kind].accuracy:10.1%}"
            f"     {moda.forced[kind].accuracy:14.1%} {moda.generated[kind].accuracy:10.1%}"
        )
    a, p = run.unknowable["all"], run.unknowable["prompt"]
    lines.append(
        f"  {KIND_TITLES['ink']:<22} {a.forced.accuracy:12.1%} {a.generated.accuracy:10.1%}"
        f"     {p.forced.accuracy:14.1%} {p.generated.accuracy:10.1%}   (chance {CHANCE:.1%})"
    )
    lines.append(
        f"  {'its loss, in nats':<22} {a.forced_loss:12.3f} {'':>10}     {p.forced_loss:14.3f} {'':>10}"
        f"   (floor ln 8 = {LOSS_FLOOR:.3f})"
    )
    return lines


def _interval(score) -> str:
    low, high = score.interval
    return f"{score.accuracy:.1%} [{low:.1%}, {high:.1%}]"


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
