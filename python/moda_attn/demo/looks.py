"""The demo's two models looked at closely: one page of their balance, with heat maps, answers and key spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..analysis import KeySpace, compare, generation_balance, key_space, received_attention
from ..analysis.html import Answer, ReportPage, SeenImage
from ..config import TEXT
from .data import Question, prompt_batch, training_batch

if TYPE_CHECKING:
    from .run import DemoRun, Experiment

#: How many scans are shown, the first of the test part: nothing is picked by its outcome.
SCANS = 2


@dataclass(frozen=True)
class Looks:
    """What the page shows besides the balance of all questions."""

    images: Sequence[SeenImage]
    answers: Sequence[Answer]
    keys: Mapping[str, KeySpace]


def look_closely(models: Mapping[str, torch.nn.Module], experiment: Experiment) -> Looks:
    """Heat maps and answers of the first scans, the keys of all questions."""
    questions = experiment.questions[:SCANS]
    scans = [question.item for question in experiment.questions]
    everything = training_batch(experiment.questions, experiment.parts["test"], experiment.tokenizer)
    return Looks(
        images=[_heat(models, experiment, question) for question in questions],
        answers=[
            _answer(name, model, experiment, question) for question in questions for name, model in models.items()
        ],
        # The questions about a scan are no independent inputs.
        keys={name: key_space(model, **everything).grouped_by(scans) for name, model in models.items()},
    )


def _heat(models: Mapping[str, torch.nn.Module], experiment: Experiment, question: Question) -> SeenImage:
    """What the image receives from the query that predicts the answer."""
    digits = experiment.parts["test"]
    batch = training_batch([question], digits, experiment.tokenizer)
    received = {name: received_attention(model, **batch) for name, model in models.items()}
    heat = {name: found.heat_map(modality=TEXT, answers_only=True) for name, found in received.items()}
    # The scans are ink on paper: 16 is black.
    first = next(iter(received.values()))
    chance = first.share_at_chance(modality=TEXT, answers_only=True)
    return SeenImage(16 - digits.scans[question.item], _spoken(question), heat, first.layers, chance)


def _answer(name: str, model: torch.nn.Module, experiment: Experiment, question: Question) -> Answer:
    batch = prompt_batch([question], experiment.parts["test"], experiment.tokenizer)
    balance = generation_balance(model, max_new_tokens=2, do_sample=False, **batch)
    words = [experiment.tokenizer.words[token] for token in balance.tokens[0].tolist() if token >= 0]
    return Answer(balance, words, f"{name}: {_spoken(question)}")


def _spoken(question: Question) -> str:
    return f"“{question.text.replace(' ?', '?')}” (right: {question.answer})"


def page_of(run: DemoRun) -> ReportPage:
    """The page of a run: the unpatched model against MODA."""
    plain, moda = run.models["unpatched"], run.models["moda"]
    scores = (
        f"{name}: " + ", ".join(f"{kind} {score.accuracy:.1%}" for kind, score in model.generated.items())
        for name, model in (("unpatched", plain), ("MODA", moda))
    )
    facts = {
        "models": f"a small LLaVA, {plain.parameters:,} parameters unpatched and {moda.parameters:,} with MODA, both"
        f" trained from the same seed for {run.recipe.steps} steps",
        "inputs": f"{len(run.test)} held-out scans of handwritten digits with four questions each; the questions about"
        " a scan count as one input",
        "prompt": "the picture first, then the question: the picture’s own queries see no text but the begin mark",
        "right answers": "; ".join(scores),
        "one seed": "which of the two attends more evenly differs from seed to seed: this page says how to read a"
        " balance, not what MODA does to a large model",
    }
    result = compare(plain.balance, moda.balance, names=("unpatched", "MODA"))
    return ReportPage(result, "The demo’s two models", facts, run.looks.images, run.looks.answers, run.looks.keys)
