"""What ``context="all"`` does: an answer that reaches its own question through the basis.

A basis summed over all tokens, as the released code sums it, holds the answer's key while the model is trained, and
earlier positions read the basis. Teacher-forced, the model needs no picture: the answer is in its own input. When it
must generate, no answer is there yet. With ``context="prompt"`` only the prompt feeds a basis, in training as in
generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .data import INK_WORDS, UNKNOWABLE, Digits, ask_all
from .evaluate import Score, generate_answers, scores_by_kind, teacher_forced
from .model import build_model
from .tokenizer import WordTokenizer
from .train import Recipe, train

LOSS_FLOOR = math.log(len(INK_WORDS))
CHANCE = 1 / len(INK_WORDS)
STEPS = 220


@dataclass(frozen=True)
class UnknowableRun:
    """A model trained on a question nobody can answer: the ink of a grey scan, drawn anew from eight at every asking.

    An honest model ends at the loss ln 8 and at one answer in eight, however it is asked.

    Attributes:
        losses: training loss of every step, in nats per answer.
        forced, forced_loss: teacher-forced accuracy and loss (nats per answer word) on the test part.
        generated: accuracy on the test part when the model must answer by itself.
    """

    losses: list[float]
    forced: Score
    forced_loss: float
    generated: Score


def train_unknowable(context: str, parts: dict[str, Digits], tokenizer: WordTokenizer, recipe: Recipe) -> UnknowableRun:
    """Trains a fresh model with this ``context`` on ink questions alone, then asks it about the test part."""
    import moda_attn

    recipe = replace(recipe, kinds=(UNKNOWABLE,))
    model = build_model(tokenizer, recipe.seed)
    moda_attn.apply(model, moda_attn.ModaConfig(context=context))
    losses = train(model, parts["train"], tokenizer, recipe, f'unknowable ink, context="{context}"')
    questions = ask_all(parts["test"], recipe.seed + 2, recipe.kinds)
    forced = teacher_forced(model, questions, parts["test"], tokenizer)
    said = generate_answers(model, questions, parts["test"], tokenizer)
    right = [answer == question.answer for answer, question in zip(said, questions, strict=True)]
    return UnknowableRun(
        # The batch loss averages the colour and the end mark, and the end mark is learned in a few steps.
        losses=[2 * loss for loss in losses],
        forced=scores_by_kind(questions, forced.right)[UNKNOWABLE],
        forced_loss=forced.loss,
        generated=scores_by_kind(questions, right)[UNKNOWABLE],
    )
