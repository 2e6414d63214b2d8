"""Processes that see a CUDA driver of the tests' own, and what each of its failures is raised as."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parent / "cuda_host" / "fake_driver.rs"
PRELUDE = "from fake_cuda import *\nimport moda_attn\nfrom moda_attn import _native, errors\n"


@cache
def driver() -> str:
    """The driver, compiled once a test run."""
    rustc = os.environ.get("RUSTC") or shutil.which("rustc")
    if rustc is None:
        pytest.skip("needs rustc, which compiles the driver of the tests")
    folder = tempfile.mkdtemp(prefix="moda-attn-driver-")
    atexit.register(shutil.rmtree, folder)
    library = Path(folder) / "libcuda.so"
    options = ["--edition=2024", "--crate-type=cdylib", "-Clink-arg=-Wl,-soname,libcuda.so", "-o", str(library)]
    subprocess.run([rustc, *options, str(SOURCE)], check=True, capture_output=True)
    return str(library)


def run(code: str, **variables: str) -> list[str]:
    """Runs code in a process with the driver; returns what it prints, line by line."""
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"MODA_ATTN_TEST_DRIVER": driver(), "FAKE_CUDA_LOG": f"{folder}/calls", "PYTHONPATH": paths}
        environment = {**os.environ, **own, "MODA_ATTN_CACHE": f"{folder}/cache", **variables}
        command = [sys.executable, "-c", PRELUDE + code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


#: One call of attention on the first device, and how it fails.
ONCE = """
q, ids = torch.randn(1, 1, 4, 8), torch.zeros(1, 4, dtype=torch.int64)
try:
    call("modular_attention", q, q, q, ids, None, True, None, None, None, None, "joint", None, "none")
except errors.ModaError as error:
    print(error.variant, type(error).__name__, error)
"""

#: The same where a kernel has found an id out of range, and again.
LATER = (
    """
import ctypes
_native.cuda_check(0)
# The driver notes where its mapped memory is: device memory is host memory.
word = int(Path(os.environ[LOG]).read_text().split("cuMemHostGetDevicePointer_v2(")[1].split(")")[0], 16)
ctypes.c_uint64.from_address(word).value = (3 << 25) | ((7 + 2**16) << 8) | 2
"""
    + 2 * ONCE
)

#: Variant -> the code, the environment, and how the message begins.
FAILURES: dict[str, tuple[str, dict[str, str], str]] = {
    "EarlierModality": (LATER, {}, "modality[0, 3] of an earlier call on cuda:0 is 7; wanted a modality id from -1"),
    "Driver": (
        ONCE,
        {"FAKE_CUDA_FAIL": "cuLaunchKernel=700"},
        "the CUDA driver refused cuLaunchKernel: CUDA_ERROR_ILLEGAL",
    ),
    "Architecture": (ONCE, {"FAKE_CUDA_CAPABILITY": "75"}, "cuda:0 is sm_75 (Fake GPU); wanted sm_80 or newer"),
    "DeviceMemory": (ONCE, {"FAKE_CUDA_FAIL": "cuModuleLoadData=2"}, "cuda:0 has no memory left for "),
    "CompilerMissing": (
        ONCE,
        {"MODA_ATTN_NVRTC": "/nowhere.so"},
        "NVRTC, the compiler of the CUDA kernels, was not found",
    ),
    "Compile": (ONCE, {"MODA_ATTN_NVRTC": "the driver"}, "NVRTC could not compile "),
}


def fail(variant: str) -> str:
    """What a process prints in which the driver or the compiler fails so: once, with a message that begins so."""
    code, variables, message = FAILURES[variant]
    given = {name: driver() if value == "the driver" else value for name, value in variables.items()}
    told = "\n".join(run(code, **given))
    assert told.count(message) == 1, told
    return told
