"""The time a training step takes, of several models under the same conditions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

WARM_UP = 3


def alternating_step_ms(
    models: Mapping[str, torch.nn.Module], batch: Mapping[str, torch.Tensor], rounds: int = 25
) -> dict[str, float]:
    """Median milliseconds of one forward and backward on ``batch``, by name of the model; weights stay as they are.

    The models take turns, so that a busy minute of the machine falls on all of them: times taken from training runs one
    after the other would compare minutes, not models.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.train()
    for _ in range(WARM_UP + rounds):
        for name, model in models.items():
            began = time.perf_counter()
            model(**batch).loss.backward()
            seconds[name].append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    for model in models.values():
        model.eval()
    return {name: 1e3 * statistics.median(values[WARM_UP:]) for name, values in seconds.items()}
