"""How a model divides its attention between modalities (the paper's equation 4 and figures 2 and 4)."""

from __future__ import annotations

from .compare import BalanceComparison, RowComparison, compare
from .measure import attention_balance
from .report import BalanceReport, RowBalance
from .statistics import balance_of_masses

__all__ = [
    "BalanceComparison",
    "BalanceReport",
    "RowBalance",
    "RowComparison",
    "attention_balance",
    "balance_of_masses",
    "compare",
]
