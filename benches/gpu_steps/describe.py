"""GPU, driver and versions."""

from __future__ import annotations

import platform

import torch
import transformers

import moda_attn
from gpu_steps import Result, run


def describe(device: str, quick: bool) -> Result:
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
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gb": round(gpu.total_memory / 1e9, 1),
            "cudnn": torch.backends.cudnn.version(),
        }
        summary = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, torch {torch.__version__}"
    return {"machine": machine, "summary": summary}


if __name__ == "__main__":
    run(describe)
