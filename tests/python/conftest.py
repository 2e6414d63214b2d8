"""Shared set-up of the Python tests."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# No test needs the network, and none may wait for it: a library that asks the Hub, even in passing, fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tiny models gain nothing from threads, and on a busy machine threads that wait for each other take minutes. Tests of
# the number of threads set it themselves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(20250710)


@pytest.fixture(autouse=True)
def _own_environment():
    """A library leaves settings in the environment, such as a Trainer its precision: no later test may find them."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def fresh_accelerator() -> Iterator[Callable[[], None]]:
    """What accelerate keeps in the process is gone before the test and after it; called, in between as well."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    reset = functools.partial(accelerate.state.AcceleratorState._reset_state, reset_partial_state=True)
    reset()
    yield reset
    reset()


@pytest.fixture
def trainer(fresh_accelerator: Callable[[], None], tmp_path: Path) -> Callable[..., Any]:
    """Makes a Trainer on the CPU, of a model and the rows it trains on and is evaluated on."""
    from transformers import Trainer, TrainingArguments

    def make(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]], **options: Any) -> Trainer:
        fresh_accelerator()
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        return Trainer(model, TrainingArguments(**settings | options), train_dataset=rows, eval_dataset=rows)

    return make
