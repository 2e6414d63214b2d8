"""Real scanned digits, a fixed split, and questions that need the picture and the words together.

The scans are scikit-learn's copy of the UCI optical recognition set (1 797 pictures, 8 x 8, 17 grey levels), shipped
inside the package: nothing is downloaded. Writers are not marked, so the parts may share them: accuracy is on new
scans, not on new hands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .tokenizer import DIGIT_WORDS, INK_WORDS, WordTokenizer

SPLIT_SIZES = {"train": 1100, "validation": 200, "test": 497}
SPLIT_SEED = 20250711
NUM_VISUAL_TOKENS = 4
IGNORE = -100


@dataclass(frozen=True)
class Digits:
    """One part of the split.

    Attributes:
        pixels: (n, 1, 8, 8) standardised.
        scans: (n, 8, 8) as scanned, 0 .. 16.
        labels: (n,) the digits.
        indices: (n,) places in scikit-learn's order.
    """

    pixels: torch.Tensor
    scans: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Question:
    """A question about picture ``item`` of a part: its ``kind``, its words and the one right answer."""

    item: int
    kind: str
    text: str
    answer: str


def load_digits() -> dict[str, Digits]:
    """The parts "train", "validation" and "test", disjoint, the same on every machine.

    Pixels are standardised with the mean and standard deviation of each pixel over the training part alone.
    """
    from sklearn.datasets import load_digits as load_scans

    scans, labels = load_scans(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    bounds = np.cumsum([0, *SPLIT_SIZES.values()])
    train = scans[order[: SPLIT_SIZES["train"]]]
    # Some border pixels are blank in every scan; the floor keeps them at zero instead of dividing by zero.
    mean, deviation = train.mean(axis=0), np.maximum(train.std(axis=0), 1.0)
    parts = {}
    for name, start, stop in zip(SPLIT_SIZES, bounds[:-1], bounds[1:], strict=True):
        indices = order[start:stop]
        pixels = torch.tensor((scans[indices] - mean) / deviation, dtype=torch.float32).view(-1, 1, 8, 8)
        parts[name] = Digits(pixels, scans[indices].reshape(-1, 8, 8), labels[indices], indices)
    return parts


def _article(word: str) -> str:
    return "an" if word == "eight" else "a"


def _claimed(digit: int, rng: random.Random) -> int:
    """The digit itself half of the time, else another one: given the words alone either answer is as likely."""
    return digit if rng.random() < 0.5 else rng.choice([other for other in range(10) if other != digit])


def _which(digit: int, rng: random.Random) -> tuple[str, str]:
    return "which digit is this ?", DIGIT_WORDS[digit]


def _is(digit: int, rng: random.Random) -> tuple[str, str]:
    claimed = _claimed(digit, rng)
    word = DIGIT_WORDS[claimed]
    return f"is this {_article(word)} {word} ?", "yes" if claimed == digit else "no"


def _greater(digit: int, rng: random.Random) -> tuple[str, str]:
    threshold = rng.randint(2, 6)
    return f"is it greater than {DIGIT_WORDS[threshold]} ?", "yes" if digit > threshold else "no"


def _caption(digit: int, rng: random.Random) -> tuple[str, str]:
    claimed = _claimed(digit, rng)
    return f"caption : the digit is {DIGIT_WORDS[claimed]} .", "true" if claimed == digit else "false"


def _ink(digit: int, rng: random.Random) -> tuple[str, str]:
    """The scans are grey and the colour is drawn anew at every asking: nobody can know it."""
    return "which ink ?", rng.choice(INK_WORDS)


_ASK: dict[str, Callable[[int, random.Random], tuple[str, str]]] = {
    "which": _which,
    "is": _is,
    "greater": _greater,
    "caption": _caption,
    "ink": _ink,
}
KINDS = ("which", "is", "greater", "caption")
UNKNOWABLE = "ink"
KIND_TITLES = {
    "which": "which digit",
    "is": "is this a …",
    "greater": "greater than …",
    "caption": "caption true or false",
    "ink": "unknowable ink",
}


def ask(digits: Digits, item: int, kind: str, rng: random.Random) -> Question:
    """A question of ``kind`` about one picture."""
    text, answer = _ASK[kind](int(digits.labels[item]), rng)
    return Question(item, kind, text, answer)


def ask_all(digits: Digits, seed: int, kinds: Sequence[str] = KINDS) -> list[Question]:
    """One question of every kind about every picture of a part, always the same for a seed."""
    rng = random.Random(seed)
    return [ask(digits, item, kind, rng) for kind in kinds for item in range(len(digits))]


def training_stream(
    digits: Digits, batch_size: int, steps: int, seed: int, kinds: Sequence[str] = KINDS
) -> Iterator[list[Question]]:
    """``steps`` lists of ``batch_size`` questions.

    The first 15 % of the steps ask mostly "which digit": the other kinds need digits to be told apart first.
    """
    rng = random.Random(seed)
    opening = [13 if kind == "which" else 1 for kind in kinds]
    for step in range(steps):
        drawn = rng.choices(kinds, opening if step < 0.15 * steps else None, k=batch_size)
        yield [ask(digits, rng.randrange(len(digits)), kind, rng) for kind in drawn]


def prompt_ids(question: Question, tokenizer: WordTokenizer) -> list[int]:
    """Begin mark, the visual placeholders, the question: what the model is given before it answers."""
    return [tokenizer.begin_id, *[tokenizer.image_id] * NUM_VISUAL_TOKENS, *tokenizer.encode(question.text)]


def training_batch(questions: Sequence[Question], digits: Digits, tokenizer: WordTokenizer) -> dict[str, torch.Tensor]:
    """Right-padded inputs with labels: -100 everywhere except the answer and its end mark."""
    rows, labels = [], []
    for question in questions:
        prompt = prompt_ids(question, tokenizer)
        answer = [*tokenizer.encode(question.answer), tokenizer.end_id]
        rows.append(prompt + answer)
        labels.append([IGNORE] * len(prompt) + answer)
    length = max(map(len, rows))
    padded = [row + [tokenizer.pad_id] * (length - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORE] * (length - len(row)) for row in labels]),
        "pixel_values": digits.pixels[[question.item for question in questions]],
    }


def prompt_batch(questions: Sequence[Question], digits: Digits, tokenizer: WordTokenizer) -> dict[str, torch.Tensor]:
    """Left-padded prompts, ready for ``model.generate``."""
    rows = [prompt_ids(question, tokenizer) for question in questions]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[tokenizer.pad_id] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": digits.pixels[[question.item for question in questions]],
    }
