"""One process of the step parity: ``python -m gpu_steps.share DEVICE all|quick SHARE COUNT NOTES``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2] / "tests" / "python"
FILES = ("test_devices.py", "test_parity.py")
#: Most characters kept of what a failure said: a compiler says much.
KEPT = 6_000


class _Notes:
    """Takes every COUNT-th test and notes, as a line of JSON each, how it ended."""

    def __init__(self, share: int, count: int, path: Path) -> None:
        self.share, self.count, self.path = share, count, path

    def _note(self, **line: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.share :: self.count]
        self._note(outcome="chosen", count=len(items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(report.longrepr if crash is None else f"{crash.path}:{crash.lineno}: {crash.message}")
            self._note(outcome="failed", test=name, why=why[:KEPT])
        elif report.when == "call" or report.outcome == "skipped":
            self._note(outcome=report.outcome, test=name)


def main(device: str, extent: str, share: str, count: str, path: str) -> int:
    """Runs the share; returns pytest's exit status, 0 where no test fell to it."""
    quick = extent == "quick"
    chosen = f"{device} and (pseudo or empty or bits)" if quick else device
    files = [str(TESTS / name) for name in (FILES[:1] if quick else FILES)]
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(TESTS), "-k", chosen]
    code = pytest.main([*options, *files], [_Notes(int(share), int(count), Path(path))])
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
