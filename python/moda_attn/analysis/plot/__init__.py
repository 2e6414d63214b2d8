"""Pictures of the attention balance, with matplotlib (the extra ``plot``), which is imported when one is drawn.

Every function returns a figure that belongs to no window: `figure.savefig(path)` writes it, a notebook shows it.
``style`` is "light" or "dark".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import ModaValueError
from .gap import gap
from .generation import generation
from .heads import heads
from .image import image
from .measures import measures
from .profile import comparison, profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..compare import BalanceComparison
    from ..report import BalanceReport

__all__ = ["comparison", "gap", "generation", "heads", "image", "measures", "profile"]

_OF_A_BALANCE = {"profile": profile, "heads": heads}
_OF_A_COMPARISON = {"profile": comparison, "measures": measures}


def draw_balance(report: BalanceReport, kind: str, **options: Any) -> Figure:
    """The picture of that name of a report."""
    return _named(_OF_A_BALANCE, kind)(report, **options)


def draw_comparison(result: BalanceComparison, kind: str, **options: Any) -> Figure:
    """The picture of that name of a comparison."""
    return _named(_OF_A_COMPARISON, kind)(result, **options)


def _named(pictures: dict[str, Callable[..., Figure]], kind: str) -> Callable[..., Figure]:
    if kind not in pictures:
        raise ModaValueError(f"kind={kind!r}; {' or '.join(map(repr, pictures))} wanted")
    return pictures[kind]
