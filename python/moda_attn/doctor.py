"""``moda-attn doctor``: what is installed, what this machine can run, and whether it computes the right thing."""

from __future__ import annotations

import importlib
import platform
from types import ModuleType
from typing import Any

from . import __version__

LIBRARIES = ("numpy", "torch", "transformers", "safetensors", "sklearn", "matplotlib", "PIL", "tqdm")
# Forward in float32 against the dense float64 reference, relative L2.
TOLERANCE = 2e-6


def examine() -> int:
    """Prints the findings; returns 0 when the kernels are there and agree with the reference, else 1."""
    print(f"moda-attn {__version__}, Python {platform.python_version()}, {platform.platform()}")
    native = _imported("moda_attn._native")
    print("\nNative extension")
    if isinstance(native, Exception):
        print(f"  missing: {native}")
    else:
        _print_nested(native.build_info(), "  ")

    if hasattr(native, "cuda_info"):
        _imported("torch")  # which brings the compiler of the kernels, and says where it is
        _imported("moda_attn.functional")
        print("\nCUDA")
        _print_nested(native.cuda_info(), "  ")

    print("\nLibraries (all optional: each unlocks a part of the package)")
    found = {name: _imported(name) for name in LIBRARIES}
    for name, module in found.items():
        missing = isinstance(module, Exception)
        state = f"cannot be imported: {module}" if missing else getattr(module, "__version__", "present")
        print(f"  {name:<13} {state}")

    torch = found["torch"]
    if isinstance(torch, Exception):
        print("\nSelf-check skipped: it needs torch")
        return int(isinstance(native, Exception))
    print(f"\nThreads: {torch.get_num_threads()} (torch.get_num_threads(), which the CPU kernels follow)")
    if isinstance(native, Exception):
        return 1
    good = True
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() and hasattr(native, "cuda_info") else [])):
        error = self_check(device)
        good &= error <= TOLERANCE
        verdict = "passed" if error <= TOLERANCE else "FAILED"
        wanted = f"at most {TOLERANCE:.0e} wanted"
        print(f"Self-check on {device} {verdict}: relative error {error:.1e} against the reference, {wanted}")
    return int(not good)


def self_check(device: str = "cpu") -> float:
    """Relative L2 distance of aligned, masked attention in float32 on a device from the dense float64 reference."""
    import torch

    from . import functional, reference

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, heads, kv_heads, length, dim = 2, 4, 2, 97, 32
    query, key, value = (normal(batch, count, length, dim) for count in (heads, kv_heads, kv_heads))
    keep, mix = normal(2, dim, dim), normal(2, dim, dim) / dim
    decay = torch.full((2, heads), 0.1, dtype=torch.float64)
    base = torch.zeros(2, heads, dtype=torch.float64)
    modality = (torch.arange(length) % 7 < 3).long().repeat(batch, 1)
    modality[0, -5:] = -1
    position = torch.arange(length).repeat(batch, 1)

    def output(ops: ModuleType, device: str, dtype: torch.dtype) -> torch.Tensor:
        q, k, v, *tables = (tensor.to(device, dtype) for tensor in (query, key, value, keep, mix, decay, base))
        ids, places = modality.to(device), position.to(device)
        aligned, _ = ops.duplex_align(k, v, ids, *tables[:2])
        sink = ops.pseudo_sink(places, ids, 4096, *tables[2:])
        return ops.modular_attention(q, aligned, v, ids, sink=sink).double().cpu()

    truth = output(reference, "cpu", torch.float64)
    return float((output(functional, device, torch.float32) - truth).norm() / truth.norm())


def _imported(name: str) -> ModuleType | Exception:
    """The module, or why it cannot be imported: a broken installation fails in more ways than ImportError."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # reported to the user, word for word
        return error


def _print_nested(values: Any, indent: str) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print_nested(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{name:<16} {shown}")
