"""Made-up balances of the usual shapes, for pictures and pages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from moda_attn.analysis import BalanceComparison, BalanceReport, KeyGap, KeySpace, balance_of_masses, compare
from moda_attn.analysis.html import Answer


def report_of(
    gamma: float = 0.9, pseudo: float = 0.1, *, layers: int = 6, heads: int = 4, inputs: int = 8, seed: int = 0
) -> BalanceReport:
    """Text, vision and answer rows whose cross mass decays."""
    rng = np.random.default_rng(seed)
    modality = np.tile([0, 1, 1, 1, 0, 0], (inputs, 1))
    masses = []
    for layer in range(layers):
        spread = rng.lognormal(0, 0.1, (inputs, heads, 1)) * np.where(modality[:, None] == 1, 0.7, 1.0)
        cross = (1 - pseudo) * np.clip(0.4 * gamma**layer * spread, 0, 0.95)
        own = 1 - pseudo - cross
        text, vision = np.where(modality[:, None] == 0, [own, cross], [cross, own])
        masses.append(np.stack([text, vision, np.full_like(text, pseudo)], axis=-1))
    answers = np.zeros(modality.shape, dtype=bool)
    answers[:, -1] = True
    return balance_of_masses(masses, modality, answer_rows=answers, patched=pseudo > 0)


def comparison_of(**sizes: int) -> BalanceComparison:
    """An unpatched model against one with pseudo-scores and less decay."""
    before, after = report_of(0.85, 0.0, **sizes), report_of(0.97, 0.2, **sizes)
    return compare(before, after, names=("unpatched", "MODA"))


def answer_of(tokens: int) -> Answer:
    """A generated answer whose look at the image fades."""
    step = np.arange(tokens)
    image, before = 0.5 * np.exp(-step / 12) + 0.1, 0.4 * (1 - np.exp(-step / 15))
    mass = 0.9 * np.stack([1 - image - before, image, before, np.full(tokens, 1 / 9)], axis=-1)
    keys = np.stack([np.full(tokens, 20), np.full(tokens, 60), step, np.zeros(tokens)], axis=-1)
    chance = keys / keys.sum(axis=-1, keepdims=True)
    balance = SimpleNamespace(
        layers=(0, 1),
        mass=np.stack([mass, mass])[:, None],
        chance=np.stack([chance, chance])[:, None],
        columns=("text", "vision", "generated", "pseudo"),
    )
    return Answer(balance, [f"word{place}" for place in range(tokens)], f"An answer of {tokens} tokens")


def keys_of(patched: bool = True, layers: int = 6, heads: int = 2, inputs: int = 8) -> KeySpace:
    """The key space of a model whose alignment halves the gap."""
    rng = np.random.default_rng(0)
    before = rng.uniform(0.5, 1.0, (3, layers, heads, 2, 2)) * np.array([0.5, 1.0, 1.0])[:, None, None, None, None]
    by_input = before.mean(2)[:, None] * rng.uniform(0.9, 1.1, (3, inputs, layers, 2, 2))
    factors = {"before": 1.0, "after": 0.5} if patched else {"before": 1.0}
    samples = {stage: KeyGap(*(factor * by_input)) for stage, factor in factors.items()}
    return KeySpace(tuple(range(layers)), KeyGap(*before), KeyGap(*(0.5 * before)) if patched else None, samples)
