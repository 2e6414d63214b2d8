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


# Library -> the extra that brings it; transformers brings what it needs itself.
_EXTRAS = {"numpy": "numpy", "torch": "torch", "transformers": "hf", "safetensors": "hf"}


def _submodule(module: str, name: str) -> Any:
    try:
        return importlib.import_module(f".{module}", __name__)
    except ModuleNotFoundError as missing:
        library = (missing.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        raise ModuleNotFoundError(
            f"moda_attn.{name} needs {library}, which is not installed: pip install {library} or "
            f'"moda-attn[{_EXTRAS[library]}]"',
            name=library,
        ) from missing


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return _submodule(name, name)
    if name in _ATTRIBUTES:
        value = getattr(_submodule(_ATTRIBUTES[name], name), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_ATTRIBUTES})
