"""The demo from beginning to end: train, measure, tell, draw."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import moda_attn

from ..analysis import BalanceReport, attention_balance
from . import leak
from .data import KINDS, SPLIT_SIZES, Digits, Question, ask_all, load_digits, training_batch, training_stream
from .evaluate import Score, generate_answers, scores_by_kind, teacher_forced, text_only_ceiling
from .looks import Looks, look_closely, page_of
from .model import build_model
from .timing import alternating_step_ms
from .tokenizer import WordTokenizer
from .train import Recipe, train

EXAMPLES = 8


@dataclass(frozen=True)
class ModelResult:
    """What was measured on one model; ``generated`` and ``forced`` hold a `Score` per kind of question."""

    parameters: int
    generated: dict[str, Score]
    forced: dict[str, Score]
    said: list[str]
    balance: BalanceReport

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "generated": {kind: score.to_dict() for kind, score in self.generated.items()},
            "teacher_forced": {kind: score.to_dict() for kind, score in self.forced.items()},
            "balance": self.balance.to_dict(),
        }


@dataclass(frozen=True)
class Example:
    """A question with what each model said."""

    question: Question
    said: dict[str, str]


@dataclass(frozen=True)
class DemoRun:
    """Everything the picture, the table and results.json show.

    `step_ms` holds the median time of forward and backward of a batch for "unpatched" and "moda".
    """

    recipe: Recipe
    test: Digits
    text_only: dict[str, float]
    models: dict[str, ModelResult]
    step_ms: dict[str, float]
    examples: list[Example]
    unknowable: dict[str, leak.UnknowableRun]
    looks: Looks
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "environment": {
                "moda_attn": moda_attn.__version__,
                "instruction_set": moda_attn.build_info()["isa"],
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
                "threads": torch.get_num_threads(),
            },
            "seconds": self.seconds,
            "split": SPLIT_SIZES,
            "recipe": asdict(self.recipe),
            "text_only_ceiling": self.text_only,
            "step_ms": self.step_ms,
            "models": {name: result.to_dict() for name, result in self.models.items()},
            "examples": [asdict(example) for example in self.examples],
            "unknowable": {
                "chance": leak.CHANCE,
                "loss_floor": leak.LOSS_FLOOR,
                **{
                    context: {
                        "teacher_forced": outcome.forced.to_dict(),
                        "teacher_forced_loss": outcome.forced_loss,
                        "generated": outcome.generated.to_dict(),
                        "training_loss": outcome.losses,
                    }
                    for context, outcome in self.unknowable.items()
                },
            },
        }


class Experiment:
    """The data, the recipe and the questions that every model of a run shares."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = WordTokenizer()
        self.parts = load_digits()
        self.questions = ask_all(self.parts["test"], recipe.seed + 1)

    def train_model(self, title: str, config: moda_attn.ModaConfig | None) -> torch.nn.Module:
        """A model from the common seed, patched with ``config`` (None: left as it is), trained by the common recipe."""
        model = build_model(self.tokenizer, self.recipe.seed)
        if config is not None:
            moda_attn.apply(model, config)
        train(model, self.parts["train"], self.tokenizer, self.recipe, title)
        return model

    def measure(self, model: torch.nn.Module) -> ModelResult:
        """Accuracy both ways and the attention balance on the test part."""
        digits = self.parts["test"]
        forced = teacher_forced(model, self.questions, digits, self.tokenizer)
        said = generate_answers(model, self.questions, digits, self.tokenizer)
        right = [answer == question.answer for answer, question in zip(said, self.questions, strict=True)]
        return ModelResult(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            generated=scores_by_kind(self.questions, right),
            forced=scores_by_kind(self.questions, forced.right),
            said=said,
            # The four questions about a scan are no independent inputs.
            balance=attention_balance(model, **training_batch(self.questions, digits, self.tokenizer)).grouped_by(
                [question.item for question in self.questions]
            ),
        )

    def time_steps(self, unpatched: torch.nn.Module, moda: torch.nn.Module) -> dict[str, float]:
        """Median time of a step of both, on a batch as large as the training's."""
        questions = next(training_stream(self.parts["train"], self.recipe.batch_size, 1, self.recipe.seed))
        batch = training_batch(questions, self.parts["train"], self.tokenizer)
        return alternating_step_ms({"unpatched": unpatched, "moda": moda}, batch)

    def examples(self, models: dict[str, ModelResult]) -> list[Example]:
        """The first scans of the test part, the kinds taking turns: nothing is picked by its outcome."""
        count = len(self.parts["test"])
        places = [(index % len(KINDS)) * count + index for index in range(EXAMPLES)]
        return [
            Example(self.questions[place], {name: result.said[place] for name, result in models.items()})
            for place in places
        ]


def run_demo(recipe: Recipe, leak_steps: int = leak.STEPS) -> DemoRun:
    """Trains and measures everything; the same recipe on the same machine gives the same numbers, times aside."""
    began = time.perf_counter()
    experiment = Experiment(recipe)
    trained = {
        "unpatched": experiment.train_model("unpatched", None),
        "moda": experiment.train_model("MODA", moda_attn.ModaConfig()),
        "leaky": experiment.train_model('MODA, context="all"', moda_attn.ModaConfig(context="all")),
    }
    models = {name: experiment.measure(model) for name, model in trained.items()}
    step_ms = experiment.time_steps(trained["unpatched"], trained["moda"])
    looks = look_closely({"unpatched": trained["unpatched"], "MODA": trained["moda"]}, experiment)
    # What the patch alone does to a model that was trained without it.
    moda_attn.apply(trained["unpatched"], moda_attn.ModaConfig())
    models["patched_untrained"] = experiment.measure(trained["unpatched"])

    short = replace(recipe, steps=leak_steps)
    unknowable = {
        context: leak.train_unknowable(context, experiment.parts, experiment.tokenizer, short)
        for context in ("prompt", "all")
    }
    return DemoRun(
        recipe=recipe,
        test=experiment.parts["test"],
        text_only=text_only_ceiling(experiment.questions),
        models=models,
        step_ms=step_ms,
        examples=experiment.examples(models),
        unknowable=unknowable,
        looks=looks,
        seconds=time.perf_counter() - began,
    )


def run_and_write(out: Path, recipe: Recipe, leak_steps: int = leak.STEPS) -> DemoRun:
    """Runs the demo and leaves ``demo.png``, ``report.html`` and ``results.json`` in ``out``, made when missing."""
    # Imported here, before minutes of training, so that a missing library is noticed at once.
    from .picture import draw

    out.mkdir(parents=True, exist_ok=True)
    run = run_demo(recipe, leak_steps)
    (out / "results.json").write_text(json.dumps(run.to_dict(), indent=1) + "\n", encoding="utf-8")
    draw(run, out / "demo.png")
    page_of(run).write(out / "report.html")
    return run
