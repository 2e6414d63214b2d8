"""The tests that are parametrised by device, on this one: shared out among processes, as most of it is compiling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpu_steps import Result, run

#: Most processes: each has a context on the device.
MOST = 12


def parity(device: str, quick: bool) -> Iterator[Result]:
    """Counts of the tests' outcomes, and what every failure said; same cases and tolerances as on the CPU."""
    count = 1 if quick else max(1, min(MOST, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        notes = [Path(folder) / f"{share}.jsonl" for share in range(count)]
        processes = [_start(device, quick, (share, count), place) for share, place in enumerate(notes)]
        while any(process.poll() is None for process in processes):
            time.sleep(1)
            yield _merged(notes)
        result = _merged(notes)
        for process, place in zip(processes, notes, strict=True):
            if process.returncode not in (0, 1):  # 1: tests failed, which the notes tell
                printed = place.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
                result["failures"][f"{place.stem} of {count} processes"] = printed[-4000:]
    good = result["passed"] == result["chosen"] - result["skipped"] > 0 and not result["failures"]
    yield {**result, "outcome": "passed" if good else "failed"}


def _start(device: str, quick: bool, share: tuple[int, int], notes: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "gpu_steps.share",
        device,
        "quick" if quick else "all",
        *map(str, share),
        str(notes),
    ]
    with notes.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _merged(notes: list[Path]) -> Result:
    """What all processes have noted so far, a line each time."""
    counts = {"passed": 0, "failed": 0, "skipped": 0, "chosen": 0}
    failures: dict[str, str] = {}
    for place in notes:
        lines = place.read_text(encoding="utf-8").split("\n")[:-1] if place.exists() else []
        for line in map(json.loads, lines):
            counts[line["outcome"]] += line.get("count", 1)
            if "why" in line:
                failures[line["test"]] = line["why"]
    told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    return {**counts, "failures": failures, "summary": f"{told} of {counts['chosen']}"}


if __name__ == "__main__":
    run(parity)
