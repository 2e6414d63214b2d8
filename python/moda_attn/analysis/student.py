"""Student's t distribution, for intervals from few values; SciPy is no dependency of this package."""

from __future__ import annotations

import functools
import math

import numpy as np

#: The confidence of every interval of this package.
CONFIDENCE = 0.95
# Beyond this the distribution is the normal one to four digits, and the interval only a trace too wide.
_LARGEST = 10_000


@functools.lru_cache(maxsize=256)
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = ``confidence``, T with ``freedom`` degrees of freedom; NaN with none.

    The probability has a closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4), in the
    angle atan(t / sqrt(freedom)), which is found by bisection.
    """
    if freedom < 1:
        return math.nan
    freedom = min(freedom, _LARGEST)
    low, high = 0.0, math.pi / 2
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _probability(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _probability(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle))."""
    odd = freedom % 2
    # Terms cos^(2k + odd) with the coefficients 1, 1/2, 1·3/(2·4), ... (even), 1, 2/3, 2·4/(3·5), ... (odd).
    k = np.arange(1, (freedom - odd) // 2)
    ratios = (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)) * math.cos(angle) ** 2
    series = 1 + np.cumprod(ratios).sum()
    if not odd:
        return math.sin(angle) * series
    rest = math.sin(angle) * math.cos(angle) * series if freedom > 1 else 0.0
    return 2 / math.pi * (angle + rest)
