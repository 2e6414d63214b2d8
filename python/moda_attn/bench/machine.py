"""What a record has to say of the machine and the versions it was taken with."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__, build_info


def describe() -> dict[str, Any]:
    """CPU, its cores and flags, versions, and the instruction set the kernels run with."""
    info = build_info()
    return {
        "cpu": _from_cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": sorted(
            flag for flag in (_from_cpuinfo("flags") or "").split() if flag.startswith(("avx", "amx", "fma"))
        ),
        "isa": info["isa"],
        "moda_attn": __version__,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
    }


def _from_cpuinfo(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)
