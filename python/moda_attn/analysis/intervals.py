"""How sure the measures are: intervals over many inputs, of one model and of the change from one to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .measures import FACTORS, MEASURES, on_scale
from .student import t_quantile
from .tally import Tally


class Interval(NamedTuple):
    """A 95 % interval over the inputs; NaN where they allow none (a single input, a measure without a value)."""

    low: float
    high: float


class Change(NamedTuple):
    """How a measure differs between two models: after minus before, for `FACTORS` after over before."""

    value: float
    low: float
    high: float


def over_inputs(tally: Tally, layers: Sequence[int]) -> dict[str, Interval]:
    """The interval of every measure over the inputs.

    The delete-one jackknife: the measures are smooth functions of means over rows, and inputs, not rows, are
    independent. Its standard error is taken with Student's t on as many degrees of freedom as there are inputs less
    one; unlike the percentiles of a bootstrap this keeps its coverage with few inputs, and it needs no random numbers.
    Lift, decay and E_DDA are factors, and get theirs on the logarithm.
    """
    value, without = on_scale(tally.means(), layers), on_scale(tally.means_without(), layers)
    result = {}
    for name in MEASURES:
        reach = _reach(without[name])
        ends = _from_scale(name, value[name] - reach, value[name] + reach)
        result[name] = Interval(*(ends if name in FACTORS else map(float, _possible(ends, tally))))
    return result


def of_masses(tally: Tally) -> np.ndarray:
    """(2, L, 3): the ends of the interval of every mean mass."""
    means, reach = (found[..., :3] for found in (tally.means(), _reach(tally.means_without())))
    return _possible(np.stack([means - reach, means + reach]), tally)


def of_mean(samples: np.ndarray) -> np.ndarray:
    """(3, ...): the mean of numbers (U, ...), one an input, and the ends of its interval by Student's t.

    Inputs without a number, NaN, are left out; NaN where none has one, and the ends where fewer than two have.
    """
    known = np.isfinite(samples)
    count = known.sum(axis=0)
    total = np.where(known, samples, 0.0).sum(axis=0)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    squares = np.where(known, samples - mean, 0.0)
    variance = np.divide((squares**2).sum(axis=0), count - 1, out=np.full(total.shape, np.nan), where=count > 1)
    quantile = np.vectorize(t_quantile, otypes=[float])(count - 1)
    reach = quantile * np.sqrt(variance / np.maximum(count, 1))
    return np.stack([mean, mean - reach, mean + reach])


def _possible(ends: Any, tally: Tally) -> np.ndarray:
    """No share of the attention is below 0, or above all there is of it: 1, with two softmaxes 2."""
    whole = tally.means()[:, :3].sum(axis=1).max()
    return np.clip(ends, 0.0, 1.0 if whole < 1.0 + 1e-3 else 2.0)


def paired_change(before: Tally, after: Tally, layers: tuple[Sequence[int], Sequence[int]]) -> dict[str, Change]:
    """The change of every measure where both were taken on the same inputs: the jackknife of the difference."""
    first, second = (_ValueAndWithout.of(*pair) for pair in zip((before, after), layers, strict=True))
    with np.errstate(invalid="ignore"):  # two factors of 0 have no ratio
        return {
            name: _change(name, first, second, _reach(second.without[name] - first.without[name])) for name in MEASURES
        }


def unpaired_change(before: Tally, after: Tally, layers: tuple[Sequence[int], Sequence[int]]) -> dict[str, Change]:
    """The change of every measure between different inputs: Welch's interval of two independent jackknives."""
    first, second = (_ValueAndWithout.of(*pair) for pair in zip((before, after), layers, strict=True))
    return {name: _change(name, first, second, _welch(first.without[name], second.without[name])) for name in MEASURES}


class _ValueAndWithout(NamedTuple):
    """The measures of all inputs, and those with each input left out, on their scale."""

    value: dict[str, np.ndarray]
    without: dict[str, np.ndarray]

    @staticmethod
    def of(tally: Tally, layers: Sequence[int]) -> _ValueAndWithout:
        return _ValueAndWithout(on_scale(tally.means(), layers), on_scale(tally.means_without(), layers))


def _variance(without: np.ndarray) -> np.ndarray:
    """The jackknife's variance, from a measure with each of n inputs left out (n, ...); NaN below two."""
    n = len(without)
    if n < 2:
        return np.full(without.shape[1:], np.nan)
    with np.errstate(invalid="ignore"):  # a factor of 0 has no spread on the logarithm
        return (n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0)


def _reach(without: np.ndarray) -> np.ndarray:
    """Half the length of the interval."""
    return t_quantile(len(without) - 1) * np.sqrt(_variance(without))


def _welch(first: np.ndarray, second: np.ndarray) -> float:
    """Half the length of the interval of a difference, with Satterthwaite's degrees of freedom rounded down."""
    one, other = float(_variance(first)), float(_variance(second))
    total = one + other
    if math.isnan(total) or total == 0:
        return total
    freedom = total**2 / (one**2 / (len(first) - 1) + other**2 / (len(second) - 1))
    return t_quantile(math.floor(freedom)) * math.sqrt(total)


def _change(name: str, before: _ValueAndWithout, after: _ValueAndWithout, reach: float | np.ndarray) -> Change:
    with np.errstate(invalid="ignore"):
        value = after.value[name] - before.value[name]
        return Change(*_from_scale(name, value, value - reach, value + reach))


def _from_scale(name: str, *values: float | np.ndarray) -> tuple[float, ...]:
    return tuple(float(np.exp(value)) if name in FACTORS else float(value) for value in values)
