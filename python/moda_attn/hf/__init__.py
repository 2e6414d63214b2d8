"""MODA inside Hugging Face models: patch in place, record, save, load, and undo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .io import load_pretrained, push_to_hub, save_pretrained
from .patch import ApplyReport, apply, remove
from .record import LayerMass, MassRecorder, record_mass
from .registry import FAMILIES, Family
from .released import load_released

if TYPE_CHECKING:
    from .callback import BalanceCallback

__all__ = [
    "FAMILIES",
    "ApplyReport",
    "BalanceCallback",
    "Family",
    "LayerMass",
    "MassRecorder",
    "apply",
    "load_pretrained",
    "load_released",
    "push_to_hub",
    "record_mass",
    "remove",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name == "BalanceCallback":  # the Trainer, and with it accelerate, is not everybody's
        from .callback import BalanceCallback

        return BalanceCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
