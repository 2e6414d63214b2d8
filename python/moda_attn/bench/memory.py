"""Peak memory of one forward and backward, taken in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from ..errors import ModaRuntimeError
from .peers import make_inputs, moda_attn


def peak_memory(shape: str) -> dict[str, float]:
    """MiB that forward and backward need above their inputs; once a process, as its peak never falls."""
    inputs = make_inputs(tuple(int(size) for size in shape.split(",")), torch.float32, backward=True)
    small = make_inputs((1, 4, 1, 32, inputs.query.shape[-1]), torch.float32, backward=True)
    moda_attn(small).backward(small.upstream)  # libraries and threads are up
    before = _peak_kib()
    moda_attn(inputs).backward(inputs.upstream)
    return {"mib": round((_peak_kib() - before) / 1024, 1)}


def peak_memory_in_a_fresh_process(shape: str) -> dict[str, float]:
    """The same in a child, whose peak is its own."""
    command = [sys.executable, "-m", "moda_attn.cli", "bench", "--peak-of", shape]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_kib() -> int:
    """Largest resident memory of this process so far. Not getrusage's: on Linux that begins at the parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise ModaRuntimeError("peak memory is read from /proc/self/status, which this system lacks")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0])
