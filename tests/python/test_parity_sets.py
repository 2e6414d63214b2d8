"""Every instruction set against the reference, each in a process of its own: the choice is made once a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CPU = Path("/proc/cpuinfo")
#: Name -> what Linux calls the features that it needs.
SETS: dict[str, set[str]] = {"scalar": set(), "avx2": {"avx2", "fma", "f16c"}}
SETS["avx512"] = SETS["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
SETS["avx512bf16"] = SETS["avx512"] | {"avx512_bf16"}
SETS["amx"] = SETS["avx512bf16"] | {"amx_tile", "amx_bf16"}

SUBSET = """
import torch

torch.set_num_threads(1)

import moda_attn
import problems
from parity import check
from problems import align_problem, attention_problem

for dtype in problems.DTYPES:
    for case in problems.STAPLES:
        mass = "modality" if case.ranges == "window" else True
        check("modular_attention", attention_problem(case, dtype), dtype, return_mass=mass)
        check("duplex_align", align_problem(case, dtype), dtype)
print(moda_attn.build_info()["isa"], len(problems.STAPLES) * len(problems.DTYPES))
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
    """By what the system says of its CPU, so that the extension is not asked about itself."""
    flags = re.search(r"^flags\s*: (.*)$", CPU.read_text(), re.MULTILINE)
    return SETS[name] <= set(flags[1].split() if flags else ())


def run(script: str, name: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "MODA_ATTN_ISA": name, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)


@pytest.mark.skipif(not CPU.exists(), reason="what the CPU has is read from /proc/cpuinfo, which is Linux's")
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
