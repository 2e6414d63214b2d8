"""The operators that the modules compute with."""

from __future__ import annotations

try:
    from . import functional as ops
except ImportError:
    from . import reference as ops

__all__ = ["ops"]
