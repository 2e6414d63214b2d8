"""moda-attn: modular duplex attention for multimodal transformers.

Importing the package is light: neither torch nor transformers is imported before a name that needs them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_SUBMODULES = ("analysis", "dlpack", "errors", "functional", "hf", "numpy", "reference")

# Public name -> the module that defines it.
_ATTRIBUTES = {
    "ModaAttention": "module",
    "ModaCache": "state",
    "ModaConfig": "config",
    "apply": "hf",
    "attention_balance": "analysis",
    "build_info": "_native",
    "check_cuda": "_cuda",
    "explain": "_native",
    "list_errors": "_native",
    "load_pretrained": "hf",
    "load_released": "hf",
    "push_to_hub": "hf",
    "remove": "hf",
    "save_pretrained": "hf",
}

__all__ = [
    "ModaAttention",
    "ModaCache",
    "ModaConfig",
    "__version__",
    "apply",
    "attention_balance",
    "build_info",
    "check_cuda",
    "explain",
    "functional",
    "list_errors",
    "load_pretrained",
    "load_released",
    "numpy",
    "push_to_hub",
    "reference",
    "remove",
    "save_pretrained",
]

if TYPE_CHECKING:
    from . import functional, numpy, reference
    from ._cuda import check_cuda
    from ._native import build_info, explain, list_errors
    from .analysis import attention_balance
    from .config import ModaConfig
    from .hf import apply, load_pretrained, load_released, push_to_hub, remove, save_pretrained
    from .module import ModaAttention
    from .state import ModaCache


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _ATTRIBUTES:
        value = getattr(importlib.import_module(f".{_ATTRIBUTES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_ATTRIBUTES})
