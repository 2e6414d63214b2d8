"""compute-sanitizer on small shapes: accesses outside of allocations, races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from gpu_steps import Result, run

TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
#: Most characters kept of a tool's report: the findings come first, the sum of them last.
KEPT = 8_000


def sanitize(device: str, quick: bool) -> Iterator[Result]:
    """Its verdicts; skipped where it is not installed or there is no GPU."""
    small = [sys.executable, "-m", "gpu_steps.small"]
    if device != "cuda":
        subprocess.run(small, check=True)
        yield {"outcome": "skipped", "summary": "the kernels' small shapes ran; the sanitizer needs a GPU"}
        return
    binary = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if binary is None:
        yield {"outcome": "skipped", "summary": "compute-sanitizer is not installed"}
        return
    subprocess.run(small, check=True)  # fills the cache of kernels, outside of the tool
    # PyTorch's allocator hands out parts of large blocks; without it every tensor has bounds of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    verdicts: dict[str, dict[str, object]] = {}
    for tool in TOOLS:
        command = [binary, "--tool", tool, "--error-exitcode", "9", *small]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        printed = done.stdout + done.stderr
        if "Device not supported" in printed:
            yield {"outcome": "skipped", "summary": "compute-sanitizer does not support this device", "output": printed}
            return
        verdicts[tool] = {"code": done.returncode, "head": printed[:KEPT], "tail": printed[KEPT:][-KEPT:]}
        yield {"verdicts": verdicts, "summary": f"so far: {', '.join(verdicts)}"}
    bad = [tool for tool, verdict in verdicts.items() if verdict["code"]]
    summary = f"findings: {', '.join(bad)}" if bad else f"no finding of {' or '.join(TOOLS)}"
    yield {"outcome": "failed" if bad else "passed", "verdicts": verdicts, "summary": summary}


if __name__ == "__main__":
    run(sanitize)
