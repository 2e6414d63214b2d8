"""The measures of the paper's equation 4, from the mean masses of the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .student import t_quantile

#: What is measured of one kind of query rows. The first three belong together and are always shown together.
MEASURES = ("disparity", "relative_disparity", "pseudo_share", "lift", "decay", "error")
#: Those that are factors: their intervals are taken on the logarithm, and their change is a ratio.
FACTORS = ("lift", "decay", "error")


def measures(means: np.ndarray, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """All of `MEASURES`, from mean masses (..., L, 5) as `Tally.means` has them. Leading shapes are kept."""
    return {name: np.exp(value) if name in FACTORS else value for name, value in on_scale(means, layers).items()}


def on_scale(means: np.ndarray, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """The measures on the scale their errors are taken on: `FACTORS` by their logarithm, -inf for a factor of 0."""
    own, cross, pseudo, chance_own, chance_cross = np.moveaxis(means, -1, 0)
    gap = np.abs(own - cross)
    slope = log_slope(cross, layers)
    at_chance = _share(chance_cross, chance_own + chance_cross).mean(axis=-1)
    return {
        "disparity": gap.mean(axis=-1),
        # A layer whose pseudo-scores take everything shows no preference between the modalities.
        "relative_disparity": _share(gap, own + cross).mean(axis=-1),
        "pseudo_share": pseudo.mean(axis=-1),
        "lift": _logarithm(_share(cross, own + cross).mean(axis=-1), of_zero=-np.inf) - _logarithm(at_chance),
        "decay": slope,
        # A sum of logarithms, because the product of many layers leaves the range of float64.
        "error": slope * _power(len(layers)) + _logarithm(gap, of_zero=-np.inf).sum(axis=-1),
    }


def disparities_at_chance(means: np.ndarray) -> tuple[float, float]:
    """``disparity`` and ``relative_disparity`` at even attention, from mean masses (L, 5)."""
    own, cross = means[:, 3], means[:, 4]
    gap = np.abs(own - cross)
    return float(gap.mean()), float(_share(gap, own + cross).mean())


def log_slope(cross: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """Least-squares slope of log ``cross`` (..., L) over the layers.

    NaN with fewer than two layers, or where a layer's cross mass is 0 and has no logarithm.
    """
    position = _centred(layers)
    if len(position) < 2:
        return np.full(cross.shape[:-1], np.nan)
    return _logarithm(cross) @ position / (position @ position)


@dataclass(frozen=True)
class DecayFit:
    """gamma of log cross_l = a + l log gamma + noise, and how well the layers fix it.

    Attributes:
        gamma: the factor by which cross-modal mass changes from a layer to the next; NaN where there is no slope.
        log_error: standard error of log gamma, from the residuals with L - 2 degrees of freedom; NaN below 3 layers.
        low, high: the 95 % interval of gamma by Student's t, on the logarithm.
        error_low, error_high: the interval of E_DDA that follows. E_DDA holds gamma to the power L (L + 1) / 2, so its
            logarithm is linear in that of gamma and its error is exactly that many times as large.
    """

    gamma: float
    log_error: float
    low: float
    high: float
    error_low: float
    error_high: float


def fit_decay(means: np.ndarray, layers: Sequence[int]) -> DecayFit:
    """The fit behind ``decay``, from mean masses (L, 5)."""
    count, position = len(layers), _centred(layers)
    scaled = on_scale(means, layers)
    slope, log_product = float(scaled["decay"]), float(scaled["error"])
    log_error = math.nan
    if count > 2:
        logs = _logarithm(means[:, 1])
        residuals = logs - logs.mean() - slope * position
        log_error = float(np.sqrt(residuals @ residuals / (count - 2) / (position @ position)))
    reach = t_quantile(count - 2) * log_error
    low, high = np.exp([slope - reach, slope + reach])
    error_low, error_high = np.exp(log_product + _power(count) * np.array([-reach, reach]))
    return DecayFit(float(np.exp(slope)), log_error, float(low), float(high), float(error_low), float(error_high))


def _power(count: int) -> int:
    """Of gamma in E_DDA: 1 + 2 + ... + L."""
    return count * (count + 1) // 2


def _centred(layers: Sequence[int]) -> np.ndarray:
    return np.asarray(layers, dtype=np.float64) - np.mean(layers)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part over whole, 0 where there is nothing of the whole."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _logarithm(mass: np.ndarray, of_zero: float = np.nan) -> np.ndarray:
    """By default NaN where the mass is 0, so that one such layer leaves the whole slope undefined."""
    return np.log(mass, out=np.full(mass.shape, of_zero), where=mass > 0)
