"""How a model divides its attention between modalities (the paper's equation 4 and figures 2 and 4).

What needs a live model imports torch when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .compare import BalanceComparison, RowComparison, compare
from .keyspace import KeyGap, KeySpace
from .report import BalanceReport, RowBalance
from .statistics import balance_of_masses

# Public name -> the module that defines it; these import torch.
_OF_MODELS = {
    "GenerationBalance": "generation",
    "KeyTally": "keys",
    "ReceivedAttention": "received",
    "attention_balance": "measure",
    "balance_over": "dataset",
    "generation_balance": "generation",
    "key_space": "keys",
    "key_space_over": "keys",
    "received_attention": "received",
}

__all__ = [
    "BalanceComparison",
    "BalanceReport",
    "GenerationBalance",
    "KeyGap",
    "KeySpace",
    "KeyTally",
    "ReceivedAttention",
    "RowBalance",
    "RowComparison",
    "attention_balance",
    "balance_of_masses",
    "balance_over",
    "compare",
    "generation_balance",
    "key_space",
    "key_space_over",
    "received_attention",
]

if TYPE_CHECKING:
    from .dataset import balance_over
    from .generation import GenerationBalance, generation_balance
    from .keys import KeyTally, key_space, key_space_over
    from .measure import attention_balance
    from .received import ReceivedAttention, received_attention


def __getattr__(name: str) -> Any:
    if name in _OF_MODELS:
        value = getattr(importlib.import_module(f".{_OF_MODELS[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
