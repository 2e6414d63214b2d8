"""Subclasses made at run time, that pickle would not find by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def derived(make: Callable[[type], type], subclass: Any) -> type:
    """`subclass`, named after the class it derives from; pickle makes it anew by `make`, a function of a module."""
    base = subclass.__bases__[0]

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, (_, *arguments), *content = super(subclass, self).__reduce_ex__(max(int(protocol), 2))
        return _empty, (make, base, *arguments), *content

    subclass.__name__ = subclass.__qualname__ = f"Moda{base.__name__}"
    subclass.__reduce_ex__ = reduce
    return subclass


def _empty(make: Callable[[type], type], base: type, *arguments: Any) -> Any:
    """An instance without content, in the process that reads it."""
    kind: Any = make(base)
    return kind.__new__(kind, *arguments)
