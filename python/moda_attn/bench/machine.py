"""What a record has to say of the machine and the versions it was taken with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__, build_info


def describe(threads: int) -> dict[str, Any]:
    """CPU, its cores and flags, versions, the instruction set the kernels run with and the threads they run on."""
    info = build_info()
    return {
        "cpu": _from_cpuinfo("model name") or platform.processor() or platform.machine(),
        "family": " ".join(f"{name} {_from_cpuinfo(field)}" for name, field in _FAMILY.items()),
        "cores": os.cpu_count(),
        "threads": threads,
        "flags": sorted(
            flag for flag in (_from_cpuinfo("flags") or "").split() if flag.startswith(("avx", "amx", "fma"))
        ),
        "isa": info["isa"],
        "compiler": info["compiler"],
        "moda_attn": __version__,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


#: A hypervisor may hide the name of a CPU; family and model still tell.
_FAMILY = {"family": "cpu family", "model": "model"}


def _from_cpuinfo(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    entries = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in entries if name.strip() == field), None)
