#!/usr/bin/env python3
"""Everything that only a GPU can show, in one command of under 8 minutes.

    python benches/gpu.py --wheel dist/moda_attn-0.1.0-cp310-abi3-manylinux_2_17_x86_64.whl --record gpu.json

The machine needs Python, torch, transformers and pytest, neither a compiler nor a network; the wheel is unpacked into a
folder of its own. Steps run one after the other, each in processes of its own with a limit in seconds: a step that
fails or takes too long is recorded with what it found until then, and the next one runs.

    describe    GPU, driver, versions, a self-check
    host        host time of the first and of later calls; CUDA graphs; torch.compile
    model       a patched tiny LLaVA: losses of training and generated tokens, on the GPU and on the CPU
    parity      the tests of tests/python that are parametrised by device, on CUDA
    race        against sdpa (flash, cuDNN) and against MODA in stock torch, behind a parity gate
    sanitize    compute-sanitizer memcheck and racecheck on small shapes, where it is installed

In several calls, each with minutes of its own: --only parity --minutes 9, then --only race --resume and so on;
--kernels names a folder in which compiled kernels stay between them. Without --wheel the package that is installed is
measured; --device cpu --quick runs all that does not need a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
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
#: Step -> seconds that are kept for it. What the steps before it leave over it may take as well.
KEPT = {"describe": 30, "host": 60, "model": 40, "parity": 150, "race": 130, "sanitize": 60}
#: Most characters of what a failing step printed.
PRINTED = 20_000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps, prints a table last; returns 0 where every step passed."""
    options = _parser().parse_args(argv)
    record: dict[str, Any] = {"device": options.device, "steps": {}}
    if options.resume and options.record and options.record.exists():
        record = json.loads(options.record.read_text(encoding="utf-8"))
    end = time.monotonic() + 60 * options.minutes
    steps = options.only or list(KEPT)
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(Path(folder), options)
        for at, step in enumerate(steps):
            started = time.monotonic()
            limit = max(end - started - sum(KEPT[later] for later in steps[at + 1 :]), 1)
            outcome = _run(step, limit, options, environment, Path(folder) / step)
            record["steps"][step] = {**outcome, "seconds": round(time.monotonic() - started, 1)}
            print(f"{step}: {outcome['outcome']} after {record['steps'][step]['seconds']} s", flush=True)
            if options.record:  # at once, so that an interruption loses nothing
                options.record.parent.mkdir(parents=True, exist_ok=True)
                options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    return int(any(step["outcome"] not in ("passed", "skipped") for step in record["steps"].values()))


def _environment(folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """Where the steps find the package and the tests' helpers, and keep compiled kernels."""
    paths = [str(HERE), str(TESTS)]
    if options.wheel is not None:
        unpacked = folder / "package"
        with zipfile.ZipFile(options.wheel) as archive:
            archive.extractall(unpacked)
        paths.insert(0, str(unpacked))
    paths += [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "MODA_ATTN_CACHE": os.path.abspath(options.kernels or folder / "kernels"),
        "HF_HUB_OFFLINE": "1",
        # Of what else is installed beside pytest nothing is wanted.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def _run(
    step: str, limit: float, options: argparse.Namespace, environment: dict[str, str], place: Path
) -> dict[str, Any]:
    """What a step found: its results so far, replaced as they grow, and what it printed where it did not end well."""
    result, printed = place.with_suffix(".json"), place.with_suffix(".log")
    command = [sys.executable, "-m", f"gpu_steps.{step}", "--device", options.device, "--result", str(result)]
    if options.quick:
        command.append("--quick")
    with printed.open("wb") as log:
        # A session of its own: what it has started ends with it.
        process = subprocess.Popen(
            command, env=environment, cwd=HERE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            outcome = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = f"cut off after {limit:.0f} s"
        finally:
            _end(process)
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if outcome == "passed":
        return {"outcome": outcome, **found}
    return {**found, "outcome": outcome, "output": printed.read_text(encoding="utf-8", errors="replace")[-PRINTED:]}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(record: dict[str, Any]) -> str:
    """A line a step, then a line a race: our time, and each peer's over ours."""
    lines = [""]
    for name, step in record["steps"].items():
        told = step.get("summary") or (step.get("output", "").strip().splitlines() or [""])[-1]
        lines.append(f"{name:<9} {step['outcome']:<8} {told}")
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
    parser.add_argument("--resume", action="store_true", help="keep the other steps that the record holds")
    parser.add_argument("--kernels", type=Path, metavar="FOLDER", help="where compiled kernels stay; default nowhere")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all steps may take together (default 8)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few small cases of each step")
    parser.add_argument("--only", nargs="+", choices=KEPT, metavar="STEP", help=f"of {', '.join(KEPT)}")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
