#!/usr/bin/env python3
"""Everything that only a GPU can show, in one command of under 8 minutes.

    python benches/gpu.py --wheel dist/moda_attn-0.1.0-cp310-abi3-manylinux_2_17_x86_64.whl --record gpu.json

The machine needs Python, torch, transformers and pytest, neither a compiler nor a network; the wheel is unpacked into a
folder of its own. Steps run one after the other, each in a process with a limit in seconds: a step that fails or takes
too long is recorded as such and the next one runs.

    describe    GPU, driver, versions
    parity      the tests of tests/python that are parametrised by device, on CUDA
    sanitize    compute-sanitizer memcheck and racecheck on small shapes, where it is installed
    model       a patched tiny LLaVA: losses of training and generated tokens, on the GPU and on the CPU
    host        CUDA graph capture; host time of the first and of later calls
    race        against sdpa (flash, cuDNN) and against MODA in stock torch, behind a parity gate

Without --wheel the package that is installed is measured; --device cpu --quick runs all that does not need a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "python"
#: Step -> seconds it may take. Together less than the 8 minutes.
LIMITS = {"describe": 60, "host": 50, "model": 60, "race": 130, "sanitize": 50, "parity": 115}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps, prints a table last; returns 0 where every step passed."""
    options = _parser().parse_args(argv)
    record: dict[str, Any] = {"device": options.device, "steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(Path(folder), options.wheel)
        for step in options.only or LIMITS:
            started = time.perf_counter()
            outcome = _run(step, options, environment, Path(folder) / f"{step}.json")
            record["steps"][step] = {**outcome, "seconds": round(time.perf_counter() - started, 1)}
            print(f"{step}: {outcome['outcome']} after {record['steps'][step]['seconds']} s", flush=True)
            if options.record:  # at once, so that an interruption loses nothing
                options.record.parent.mkdir(parents=True, exist_ok=True)
                options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    return int(any(step["outcome"] not in ("passed", "skipped") for step in record["steps"].values()))


def _environment(folder: Path, wheel: Path | None) -> dict[str, str]:
    """Where the steps find the package and the tests' helpers; kernels are compiled anew."""
    paths = [str(HERE), str(TESTS)]
    if wheel is not None:
        unpacked = folder / "package"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        paths.insert(0, str(unpacked))
    paths += [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "MODA_ATTN_CACHE": str(folder / "kernels"),
        "HF_HUB_OFFLINE": "1",
    }


def _run(step: str, options: argparse.Namespace, environment: dict[str, str], result: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"gpu_steps.{step}", "--device", options.device, "--result", str(result)]
    if options.quick:
        command.append("--quick")
    try:
        done = subprocess.run(
            command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=LIMITS[step], check=False
        )
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return {**_read(result), "outcome": f"cut off after {LIMITS[step]} s", "output": text[-2000:]}
    outcome = {"outcome": "passed" if done.returncode == 0 else "failed", **_read(result)}
    if done.returncode:
        outcome |= {"outcome": "failed", "output": (done.stdout + done.stderr)[-4000:]}
    return outcome


def _read(result: Path) -> dict[str, Any]:
    return json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}


def table(record: dict[str, Any]) -> str:
    """A line a step, then a line a race: our time, and each peer's over ours."""
    lines = [""]
    for name, step in record["steps"].items():
        told = step.get("summary") or step.get("output", "").strip().splitlines()[-1:] or ""
        lines.append(f"{name:<9} {step['outcome']:<8} {told if isinstance(told, str) else told[0]}")
    for row in record["steps"].get("race", {}).get("rows", []):
        times = row["times_ms"]
        ours = times["moda_attn"]
        others = "  ".join(f"{peer} {time / ours:.2f}" for peer, time in times.items() if peer != "moda_attn")
        lines.append(f"  {row['name']:<48} {ours:9.3f} ms {row['tflops']:6.1f} TFLOP/s  {others}")
        lines += [f"    {peer} does not run: {why}" for peer, why in row["missing"].items()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--wheel", type=Path, help="the abi3 wheel to unpack and measure")
    parser.add_argument("--record", type=Path, metavar="FILE", help="where the JSON goes, written after every step")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few small cases of each step")
    parser.add_argument("--only", nargs="+", choices=LIMITS, metavar="STEP", help=f"of {', '.join(LIMITS)}")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
