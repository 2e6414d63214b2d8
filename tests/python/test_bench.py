"""The benchmark: it refuses wrong numbers, its records are sound, and what README and docs quote is recorded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moda_attn
from moda_attn.bench import cases, figures, gate, main, record, report

ROOT = Path(__file__).parents[2]
RECORDED = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "benches" / "record").glob("*.json"))]


@pytest.fixture
def tiny(monkeypatch):
    """Races small enough for a test, one of every kind."""
    races = (
        cases.Race("forward", "float32", (1, 2, 1, 32, 16), {"sdpa": 1e9, "eager_moda": 0}),
        cases.Race("forward", "bfloat16", (1, 2, 1, 32, 16), backward=True),
        cases.Race("decode", "float32", (2, 2, 1, 32, 16), {"sdpa": 0}, decode=True, quick=True),
    )
    monkeypatch.setattr("moda_attn.bench.run.RACES", races)
    monkeypatch.setattr("moda_attn.bench.run.FIGURES", figures.FIGURES[-1:])
    monkeypatch.setattr("moda_attn.bench.run.SECTIONS", ("forward", "decode", "memory"))
    monkeypatch.setattr("moda_attn.bench.timing.WORTH", 0.0)
    return races


def test_every_row_has_a_name_of_its_own_and_can_be_chosen():
    rows = [*cases.RACES, *figures.FIGURES]
    assert len({row.name for row in rows}) == len(rows)
    assert {race.section for race in cases.RACES}.isdisjoint(figure.section for figure in figures.FIGURES)
    for race in cases.RACES:
        assert set(race.goals) <= set(race.peers), race.name


def test_races_are_run_printed_and_recorded(tiny, tmp_path, capsys):
    arguments = ["--threads", "1", "--repeat", "1", "--record", str(tmp_path)]
    assert main(["--only", "forward", "decode", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "goal 1e+09, MISSED" in printed
    assert "2 of 3 goals met" in printed
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert [row["name"] for row in written["races"]] == [race.name for race in tiny]
    for row in written["races"]:
        assert all(time > 0 for time in row["times_ms"].values())
        assert row["parity"]["output"] < 1e-2
        assert row["others"] is None or 0 <= row["others"] <= 1
    assert set(written["races"][0]["times_ms"]) == {"sdpa", "sdpa_moda", "eager_moda", "moda_attn"}
    assert set(written["races"][1]["parity"]) > {"query", "mix", "bias"}
    assert {"cpu", "flags", "isa", "torch", "threads"} <= set(written["machine"])

    assert main(["--quick", "--only", "decode", *arguments]) == 0
    again = json.loads(path.read_text())
    assert again["races"][:2] == written["races"][:2], "what was not measured anew is kept"
    assert len(again["races"]) == 3

    for row in again["races"]:
        row["others"] = 0.5 if row["kind"] == "decode" else 0.0
    path.write_text(json.dumps(again))
    capsys.readouterr()
    assert main(["--resume", "--only", "forward", "decode", *arguments]) == 0
    printed = capsys.readouterr().out
    assert tiny[2].name in printed, "what was disturbed is measured again"
    assert tiny[0].name not in printed
    assert "1 of 1 goals met" in printed


def test_rows_of_another_version_are_not_kept():
    old = {"machine": {"torch": "1"}, "races": [{"name": "a"}], "figures": []}
    new = {"machine": {"torch": "2"}, "races": [{"name": "b"}], "figures": []}
    assert record.merged(old, new) == new
    assert [row["name"] for row in record.merged(old, {**new, "machine": old["machine"]})["races"]] == ["a", "b"]


@pytest.mark.parametrize("backward", [False, True])
def test_no_time_is_taken_of_wrong_numbers(monkeypatch, capsys, backward):
    from moda_attn import functional

    right = functional.modular_attention
    monkeypatch.setattr(functional, "modular_attention", lambda *args, **options: right(*args, **options) * 1.001)
    race = cases.Race("forward", "float32", (1, 2, 1, 32, 16), backward=backward)
    with pytest.raises(RuntimeError, match=re.escape(race.name)):
        gate.gate(race)
    assert main(["--dtype", "float32", "--shape", "1,2,1,32,16", "--threads", "1"]) == 1
    assert "wrong numbers" in capsys.readouterr().err


def test_decoding_attends_with_the_new_key_aligned(monkeypatch):
    from moda_attn import functional

    right = functional.duplex_align

    def wrong_for_the_new_key(*args, basis=None, **options):
        aligned, used = right(*args, basis=basis, **options)
        return aligned if basis is None else 2 * aligned, used

    race = cases.Race("decode", "float32", (1, 2, 1, 32, 16), decode=True)
    assert gate.gate(race)["output"] < 2e-6
    monkeypatch.setattr(functional, "duplex_align", wrong_for_the_new_key)
    with pytest.raises(RuntimeError, match="wrong numbers"):
        gate.gate(race)


def test_a_shape_that_is_none_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        main(["--shape", "1,2,3"])
    assert "--shape" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECORDED)
def test_readme_and_docs_quote_the_record(name: str):
    recorded = json.loads((ROOT / name).read_text(encoding="utf-8"))
    readme, page = ((ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "docs/performance.md"))
    assert name in readme
    assert name in page
    assert report.headline(recorded) in readme
    assert report.table(recorded) in page
    assert recorded["machine"]["torch"].split("+")[0] in readme


def test_a_memory_figure_is_taken_in_a_process_of_its_own():
    from moda_attn.bench.memory import peak_memory
    from moda_attn.bench.process import in_a_fresh_process

    used = in_a_fresh_process({"OMP_NUM_THREADS": "1"}, peak_memory, "eager_moda", (1, 2, 1, 512, 16), 1)
    dense = 4 * 2 * 512 * 512 / (1 << 20)
    assert dense < used < 100 * dense
    assert torch.get_num_threads() >= 1


def test_what_of_the_gpu_session_needs_no_gpu_runs(tmp_path: Path):
    written = tmp_path / "record.json"
    options = ["--device", "cpu", "--quick", "--record", str(written), "--only", "describe", "race", "parity"]
    paths = os.pathsep.join([str(Path(moda_attn.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "benches" / "gpu.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads(written.read_text(encoding="utf-8"))["steps"]
    assert {name: step["outcome"] for name, step in steps.items()} == dict.fromkeys(options[-3:], "passed")
    for row in steps["race"]["rows"]:
        assert row["times_ms"]["moda_attn"] > 0
        assert not row["missing"]
    assert "TFLOP/s" in done.stdout.splitlines()[-1]
