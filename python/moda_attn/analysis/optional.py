"""Libraries that only parts of the analysis need."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, extra: str, purpose: str) -> Any:
    """The module; where it is missing, an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        library = module.partition(".")[0]
        if missing.name != library:
            raise
        raise ImportError(
            f'{purpose} needs {library}, which is not installed: pip install {library} or "moda-attn[{extra}]"',
            name=library,
        ) from missing
