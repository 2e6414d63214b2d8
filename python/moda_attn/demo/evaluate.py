"""What is measured after training: accuracy when answering and when teacher-forced, and its uncertainty."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .data import IGNORE, Digits, Question, prompt_batch, training_batch
from .tokenizer import WordTokenizer

BATCH = 256


@dataclass(frozen=True)
class Score:
    """``correct`` of ``total`` answers, with the Wilson 95 % interval of the rate."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.total)

    def to_dict(self) -> dict[str, float | int]:
        low, high = self.interval
        return {"correct": self.correct, "total": self.total, "accuracy": self.accuracy, "low": low, "high": high}


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike the normal one it stays inside [0, 1] near the ends."""
    rate = correct / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # At the ends the formula gives exactly 0 and 1, up to rounding.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


def _batches(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), BATCH):
        yield questions[start : start + BATCH]


@torch.no_grad()
def generate_answers(model, questions: Sequence[Question], digits: Digits, tokenizer: WordTokenizer) -> list[str]:
    """What the model says, greedily, when it is given the picture and the question and nothing else."""
    model.eval()
    longest = max(len(question.answer.split()) for question in questions) + 1
    answers = []
    for batch in _batches(questions):
        inputs = prompt_batch(batch, digits, tokenizer)
        generated = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        answers += [tokenizer.decode(row) for row in generated[:, inputs["input_ids"].shape[1] :].tolist()]
    return answers


@dataclass(frozen=True)
class TeacherForced:
    """``right`` per question, given the answer tokens before; ``loss`` in nats per answer word, without end marks."""

    right: list[bool]
    loss: float


@torch.no_grad()
def teacher_forced(model, questions: Sequence[Question], digits: Digits, tokenizer: WordTokenizer) -> TeacherForced:
    """The look that training itself takes: the whole sequence, answer included, goes through the model at once."""
    model.eval()
    right: list[bool] = []
    loss_sum, words = 0.0, 0
    for batch in _batches(questions):
        inputs = training_batch(batch, digits, tokenizer)
        log_probs = model(**inputs).logits[:, :-1].float().log_softmax(-1)
        wanted = inputs["labels"][:, 1:]
        supervised = wanted != IGNORE
        right += ((log_probs.argmax(-1) == wanted) | ~supervised).all(1).tolist()
        answer_words = supervised & (wanted != tokenizer.end_id)
        picked = log_probs.gather(2, wanted.clamp_min(0).unsqueeze(2)).squeeze(2)
        loss_sum -= picked[answer_words].sum().item()
        words += int(answer_words.sum())
    return TeacherForced(right, loss_sum / words)


def scores_by_kind(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, Score]:
    """One score per kind of question, in the order the kinds appear."""
    tally: dict[str, list[bool]] = defaultdict(list)
    for question, is_right in zip(questions, right, strict=True):
        tally[question.kind].append(is_right)
    return {kind: Score(sum(flags), len(flags)) for kind, flags in tally.items()}


def text_only_ceiling(questions: Sequence[Question]) -> dict[str, float]:
    """Best accuracy on these very questions of any rule that reads the words and never sees the picture."""
    answers: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for question in questions:
        answers[question.kind][question.text][question.answer] += 1
    return {
        kind: sum(max(counts.values()) for counts in texts.values()) / sum(counts.total() for counts in texts.values())
        for kind, texts in answers.items()
    }
