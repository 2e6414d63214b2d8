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


class Company:
    """What else the machine has been doing since this object was made: times taken beside others are worth little."""

    def __init__(self) -> None:
        self._start = _clocks()

    def share(self) -> float | None:
        """Part of all processors' time that went to other processes or other guests, 0 to 1; None where unknown."""
        end = _clocks()
        if end is None or self._start is None:
            return None
        own, busy, elapsed = (after - before for before, after in zip(self._start, end, strict=True))
        return max(0.0, min(1.0, (busy - own) / max(elapsed, 1e-3)))


def _clocks() -> tuple[float, float, float] | None:
    """Seconds of this process and its children that have ended, of everybody, and all there were."""
    try:
        ticks = [int(count) for count in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, idle, waiting, *interrupts_and_stolen = (count / os.sysconf("SC_CLK_TCK") for count in ticks)
    busy = user + nice + system + sum(interrupts_and_stolen)
    return sum(os.times()[:4]), busy, busy + idle + waiting


#: A hypervisor may hide the name of a CPU; family and model still tell.
_FAMILY = {"family": "cpu family", "model": "model"}


def _from_cpuinfo(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    entries = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in entries if name.strip() == field), None)
