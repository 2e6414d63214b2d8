"""The tests that are parametrised by device, on this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_steps import Result, run

TESTS = Path(__file__).resolve().parents[2] / "tests" / "python"
FILES = ("test_devices.py", "test_parity.py")


class _Counter:
    """Outcomes by name, and the first words of every failure."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures[report.nodeid.rpartition("::")[2]] = str(report.longrepr).strip().splitlines()[-1][:300]


def parity(device: str, quick: bool) -> Result:
    """Counts of the tests' outcomes; same cases and tolerances as on the CPU."""
    counter = _Counter()
    chosen = f"{device} and (pseudo or empty or bits)" if quick else device
    files = [str(TESTS / name) for name in (FILES[:1] if quick else FILES)]
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "-c", "/dev/null", "-k", chosen, *files], [counter])
    counts = counter.counts
    good = counts["passed"] > 0 and not counts["failed"]
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    return {"outcome": "passed" if good else "failed", **counts, "failures": counter.failures, "summary": summary}


if __name__ == "__main__":
    run(parity)
