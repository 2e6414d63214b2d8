"""The steps of ``benches/gpu.py``, a module each, run as ``python -m gpu_steps.STEP --device cuda --result FILE``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]


def run(step: Callable[[str, bool], Iterator[Result]]) -> None:
    """Runs a step on a device. It gives all it has found so far again and again, and each time that is written in place
    of what was: a step that is cut off loses nothing. A step that is not passed says so in its last result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; --device cpu --quick runs all that does not need one")
    result: Result = {}
    for result in step(options.device, options.quick):
        written = options.result.with_suffix(".part")
        written.write_text(json.dumps(result), encoding="utf-8")
        written.replace(options.result)
    raise SystemExit(int(result.get("outcome", "passed") not in ("passed", "skipped")))
