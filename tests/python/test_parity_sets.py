"""Every instruction set against the reference, each in a process of its own: the choice is made once a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SETS = ("scalar", "avx2", "avx512", "avx512bf16")

SUBSET = """
import torch

torch.set_num_threads(1)

import moda_attn
import parity
from parity import align_problem, attention_problem, check

for dtype in parity.DTYPES:
    for case in parity.STAPLES:
        mass = "modality" if case.ranges == "window" else True
        check("modular_attention", attention_problem(case, dtype), dtype, return_mass=mass)
        check("duplex_align", align_problem(case, dtype), dtype)
print(moda_attn.build_info()["isa"], len(parity.STAPLES) * len(parity.DTYPES))
"""

ASK = """
import torch
from moda_attn import functional as F
from moda_attn.errors import ModaRuntimeError

x, ids = torch.randn(1, 1, 3, 8), torch.zeros(1, 3, dtype=torch.long)
eye = torch.eye(8)[None]
for call in (lambda: F.modular_attention(x, x, x, ids), lambda: F.duplex_align(x, x, ids, eye, eye)):
    try:
        call()
    except ModaRuntimeError as error:
        print("InstructionSet:", error)
    else:
        print("it ran")
"""


def machine_has(name: str) -> bool:
    """What torch finds on this machine, so that the extension is not asked about itself."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if name == "avx512bf16":
        return capability == "avx512" and torch.cpu._is_avx512_bf16_supported()
    return name == "scalar" or SETS.index(name) <= (SETS.index(capability) if capability in SETS else 0)


def run(script: str, name: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "MODA_ATTN_ISA": name, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_is_the_reference(name: str):
    """A set this machine lacks must say so by name: then, and only then, is there nothing to compare."""
    if machine_has(name):
        done = run(SUBSET, name)
        assert done.stdout.split() == [name, "24"], done.stderr
    else:
        assert_refused(name)


def test_a_set_that_does_not_exist_is_refused():
    assert_refused("sse9")


def assert_refused(name: str) -> None:
    done = run(ASK, name)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.startswith(f'InstructionSet: MODA_ATTN_ISA asks for "{name}"; this machine and build offer scalar')
