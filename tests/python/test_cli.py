"""The command line: every command runs, says what it found, and fails with a message and a status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image

import moda_attn
from moda_attn import cli

PROMPT = "USER: <image> which digit ASSISTANT:"
NEVER_IMPORTED = ("torch", "transformers", "numpy", "matplotlib", "sklearn")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random LLaVA with its processor, saved as a user's checkpoint would be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":", "which", "digit", "is", "this", "?"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessor(size=side, crop_size=side, do_resize=True, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_id=4,
        image_seq_length=4,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.linear_gradient("L").resize((20, 24)).save(folder / "picture.png")
    return folder


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


def test_doctor_names_versions_threads_and_passes_its_check(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"moda-attn {moda_attn.__version__}" in printed
    assert re.search(rf"torch +{re.escape(torch.__version__)}", printed)
    assert f"Threads: {torch.get_num_threads()}" in printed
    assert "Self-check passed" in printed


def test_doctor_fails_when_the_kernels_disagree_with_the_reference(capsys, monkeypatch):
    from moda_attn import functional

    right = functional.modular_attention
    monkeypatch.setattr(functional, "modular_attention", lambda *args, **options: right(*args, **options) * 1.001)
    assert cli.main(["doctor"]) == 1
    assert "Self-check FAILED" in capsys.readouterr().out


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


def test_balance_counts_the_image_tokens_and_writes_its_report(checkpoint, tmp_path, capsys):
    assert cli.main(["balance", *looking_at(checkpoint, "--out", tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {balance["rows_of"]: balance["rows"] for balance in report["modalities"]}
    # 16 x 16 pixels in patches of 8: four visual tokens.
    assert rows["vision"] == 4
    assert report["patched"] is False
    assert "vision: 4 query rows" in capsys.readouterr().out


def test_balance_with_saved_moda_weights(checkpoint, tmp_path, capsys):
    from moda_attn.demo.checkpoint import load_checkpoint

    model, _ = load_checkpoint(str(checkpoint))
    moda_attn.apply(model, moda_attn.ModaConfig(base=1.0))
    moda_attn.save_pretrained(model, tmp_path / "moda")
    assert (
        cli.main(["balance", *looking_at(checkpoint, "--moda", tmp_path / "moda", "--out", tmp_path / "r.json")]) == 0
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["patched"] is True
    assert all(balance["pseudo_share"] > 0.3 for balance in report["modalities"])
    assert "patched model" in capsys.readouterr().out


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
