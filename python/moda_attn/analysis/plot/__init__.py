"""Pictures of the attention balance, with matplotlib (the extra ``plot``), which is imported when one is drawn.

Every function returns a figure that belongs to no window: `figure.savefig(path)` writes it, a notebook shows it.
``style`` is "light" or "dark".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ModaValueError
from .heads import heads
from .profile import comparison, profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..report import BalanceReport

__all__ = ["comparison", "heads", "profile"]

_OF_A_BALANCE = {"profile": profile, "heads": heads}


def draw_balance(report: BalanceReport, kind: str, **options: Any) -> Figure:
    """The picture of that name of a report."""
    if kind not in _OF_A_BALANCE:
        raise ModaValueError(f"kind={kind!r}; {' or '.join(map(repr, _OF_A_BALANCE))} wanted")
    return _OF_A_BALANCE[kind](report, **options)
