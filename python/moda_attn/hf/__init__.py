"""MODA inside Hugging Face models: patch in place, record, save, load, and undo."""

from __future__ import annotations

from .io import load_pretrained, push_to_hub, save_pretrained
from .patch import ApplyReport, apply, remove
from .record import LayerMass, MassRecorder, record_mass
from .registry import FAMILIES, Family
from .released import load_released

__all__ = [
    "FAMILIES",
    "ApplyReport",
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
