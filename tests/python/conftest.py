"""Shared set-up of the Python tests."""

from __future__ import annotations

import os

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
