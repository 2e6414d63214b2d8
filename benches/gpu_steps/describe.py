"""GPU, driver and versions, and whether the operators compute the right thing at all."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch
import transformers

import moda_attn
from gpu_steps import Result, run
from moda_attn import doctor


def describe(device: str, quick: bool) -> Iterator[Result]:
    """What a record has to say of the machine."""
    info = moda_attn.build_info()
    machine = {
        "moda_attn": moda_attn.__version__,
        "features": info["features"],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "explain": moda_attn.explain().splitlines(),
    }
    summary = f"torch {torch.__version__}, no GPU"
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": gpu.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gb": round(gpu.total_memory / 1e9, 1),
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
        }
        summary = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, driver {machine['driver']}, torch {torch.__version__}"
    yield {"machine": machine, "summary": summary}
    error = doctor.self_check(device)
    outcome = "passed" if error <= doctor.TOLERANCE else "failed"
    yield {"outcome": outcome, "machine": machine, "error": error, "summary": f"{summary}; self-check: {error:.1e}"}


def _driver() -> str:
    """The driver's own version, where its tool is at hand."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()[0]


if __name__ == "__main__":
    run(describe)
