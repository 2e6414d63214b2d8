"""Measuring needs no memory that a plain forward does not need; no attention map, at any length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import long_forward


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux's")
def test_peak_memory_at_8192_tokens():
    path = os.pathsep.join(entry for entry in sys.path if entry)
    # The threshold keeps glibc from holding on to some freed tensors in one run and to others in the next.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": path}
    environment = os.environ | settings
    program = [sys.executable, "-W", "ignore", long_forward.__file__]
    run = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    plain, balance, received = json.loads(run.stdout.splitlines()[-1])
    assert balance < 1.01 * plain
    one_map = 4 * long_forward.TOKENS**2  # of one head of one layer, in float32
    assert received - balance < one_map / 4
