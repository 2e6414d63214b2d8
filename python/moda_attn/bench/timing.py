"""Medians of interleaved runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

#: A sample lasts at least so many seconds: what is shorter is called several times in a row.
SAMPLE = 0.005
#: Short calls get more samples than were asked for, until so many seconds or samples are spent on them.
WORTH, MOST = 0.5, 40


def interleaved(runs: Mapping[str, Callable[[], object]], samples: int) -> dict[str, float]:
    """Median seconds of one call of each, their samples taken in turn so that a machine's drift meets all alike."""
    calls = {}
    for name, run in runs.items():
        run()  # the first call starts threads and fills caches
        calls[name] = max(1, math.ceil(SAMPLE / _seconds(run, 1)))
    one_round = sum(_seconds(run, calls[name]) * calls[name] for name, run in runs.items())
    samples = max(samples, min(MOST, int(WORTH / one_round)))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            taken[name].append(_seconds(run, calls[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls
