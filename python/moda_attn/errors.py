"""The exceptions of the package.

Each class derives from :class:`ModaError` and from the built-in class that callers already catch, so both
``except ValueError`` and ``except moda_attn.errors.ModaError`` work. The native extension raises these very classes.
"""

from __future__ import annotations

__all__ = ["ModaError", "ModaMemoryError", "ModaRuntimeError", "ModaTypeError", "ModaValueError"]


class ModaError(Exception):
    """Base class of everything this package raises on purpose."""


class ModaValueError(ModaError, ValueError):
    """A value that cannot be right: a shape that does not fit, a modality id out of range, a contradictory option."""


class ModaTypeError(ModaError, TypeError):
    """An argument of the wrong kind: not a tensor, a dtype that is not supported, dtypes mixed."""


class ModaRuntimeError(ModaError, RuntimeError):
    """A right request that cannot be carried out here: a missing instruction set, a state that forbids it."""


class ModaMemoryError(ModaError, MemoryError):
    """A buffer could not be allocated; the inputs are untouched."""
