"""The command line: every command runs, says what it found, and fails with a message and a status."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import types

import pytest
import torch

import moda_attn
from moda_attn import cli
from tiny_checkpoint import make_checkpoint

PROMPT = "USER: <image> which digit ASSISTANT:"
NEVER_IMPORTED = ("torch", "transformers", "numpy", "matplotlib", "sklearn")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def looking_at(checkpoint, *more: object) -> list[str]:
    image = checkpoint / "picture.png"
    return [str(part) for part in ("--model", checkpoint, "--image", image, "--prompt", PROMPT, *more)]


def test_help_and_usage_errors_import_nothing_heavy():
    program = (
        "import sys, moda_attn.cli as cli\n"
        "for arguments in (['--help'], ['demo', '--help'], ['doctor', '--help'], ['nothing'], []):\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit as stop: print('status', stop.code)\n"
        f"print('heavy', [name for name in {NEVER_IMPORTED!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.findall(r"status (\d)", done.stdout) == ["0", "0", "0", "2", "2"]
    assert "heavy []" in done.stdout
    assert all(command in done.stdout for command in ("doctor", "demo", "balance", "bench"))


def test_the_package_is_the_command_too(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moda-attn", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("moda_attn", run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"moda-attn {moda_attn.__version__}\n")


def test_doctor_names_versions_threads_and_passes_its_check(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"moda-attn {moda_attn.__version__}" in printed
    assert re.search(rf"torch +{re.escape(torch.__version__)}", printed)
    assert f"Threads: {torch.get_num_threads()}" in printed
    assert "Self-check on cpu passed" in printed


def test_doctor_fails_when_the_kernels_disagree_with_the_reference(capsys, monkeypatch):
    from moda_attn import functional

    right = functional.modular_attention
    monkeypatch.setattr(functional, "modular_attention", lambda *args, **options: right(*args, **options) * 1.001)
    assert cli.main(["doctor"]) == 1
    assert "Self-check on cpu FAILED" in capsys.readouterr().out


def test_doctor_reports_a_library_that_cannot_be_imported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["doctor"]) == 0
    assert re.search(r"sklearn +cannot be imported: ", capsys.readouterr().out)


def test_doctor_without_the_extension_says_so_and_fails(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "moda_attn._native", None)
    assert cli.main(["doctor"]) == 1
    assert "missing: " in capsys.readouterr().out


def test_bench_hands_its_arguments_over(monkeypatch):
    seen = []
    bench = types.ModuleType("moda_attn.bench")
    bench.main = lambda arguments: seen.append(arguments)
    monkeypatch.setitem(sys.modules, "moda_attn.bench", bench)
    assert cli.main(["bench", "--help", "--dtype", "float32"]) == 0
    assert seen == [["--help", "--dtype", "float32"]]


def test_demo_trains_draws_and_writes(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--steps", "2", "--unknowable-steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Right answers on 497 held-out scans" in printed
    assert (tmp_path / "out" / "demo.png").stat().st_size > 50_000
    assert json.loads((tmp_path / "out" / "results.json").read_text())["recipe"]["steps"] == 2
    assert "The demo’s two models" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("given", [["--model", "x"], ["--image", "x", "--prompt", "y"]])
def test_half_a_checkpoint_request_is_refused(given, capsys):
    assert cli.main(["demo", *given]) == 2
    message = capsys.readouterr().err
    assert "belong together" in message
    assert given[0] in message


def test_demo_looks_at_a_checkpoint(checkpoint, tmp_path, capsys):
    assert cli.main(["demo", *looking_at(checkpoint, "--out", tmp_path, "--max-new-tokens", 3)]) == 0
    printed = capsys.readouterr().out
    seen = json.loads((tmp_path / "look.json").read_text())
    assert seen["prompt"] == PROMPT
    assert set(seen["answers"]) == set(seen["balance"]) == {"unpatched", "patched, untrained"}
    before, after = seen["balance"]["unpatched"], seen["balance"]["patched, untrained"]
    assert (before["patched"], after["patched"]) == (False, True)
    assert before["layers"] == after["layers"] == [0, 1, 2]
    for rows in before["modalities"]:
        assert rows["pseudo_share"] == 0
    for rows in after["modalities"]:
        assert rows["pseudo_share"] > 0
    assert "Attention balance, unpatched model" in printed
    assert "Attention balance, patched model" in printed


def test_a_bare_question_is_wrapped_in_llavas_own_form(checkpoint):
    from moda_attn.demo.checkpoint import load_checkpoint, open_image, prepare

    model, processor = load_checkpoint(str(checkpoint))
    prompt, inputs = prepare(model, processor, open_image(checkpoint / "picture.png"), "which digit is this ?")
    assert prompt == "USER: <image>\nwhich digit is this ? ASSISTANT:"
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 4


def test_a_chat_template_is_used_when_there_is_one(checkpoint):
    from moda_attn.demo.checkpoint import load_checkpoint, open_image, prepare

    model, processor = load_checkpoint(str(checkpoint))
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    prompt, _ = prepare(model, processor, open_image(checkpoint / "picture.png"), "which digit ?")
    assert prompt == "<image> which digit ? ASSISTANT:"


@pytest.mark.parametrize("missing", ["--image", "--model"])
def test_a_missing_file_is_a_message_not_a_traceback(checkpoint, tmp_path, capsys, missing):
    arguments = looking_at(checkpoint, "--out", tmp_path)
    arguments[arguments.index(missing) + 1] = str(tmp_path / "absent")
    assert cli.main(["demo", *arguments]) == 1
    message = capsys.readouterr().err
    assert "moda-attn demo: " in message
    assert "absent" in message
