"""`moda-attn balance`: pictures and data files in, a page and numbers out, and errors that say what was wrong."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

import moda_attn
from moda_attn import cli
from moda_attn.analysis import attention_balance, grid
from moda_attn.analysis.command import model_inputs
from moda_attn.analysis.examples import Example
from moda_attn.demo.checkpoint import load_checkpoint
from tiny_checkpoint import make_checkpoint

PROMPT = "USER: <image> which digit ASSISTANT:"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pictures(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("b.png", "a.JPG", "c.png"):
        shutil.copy(checkpoint / "picture.png", folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def moda(checkpoint, tmp_path_factory):
    model, _ = load_checkpoint(str(checkpoint))
    moda_attn.apply(model, moda_attn.ModaConfig(base=1.0))
    folder = tmp_path_factory.mktemp("weights") / "moda"
    moda_attn.save_pretrained(model, folder)
    return folder


def balance(*arguments: object) -> int:
    return cli.main(["balance", *map(str, arguments)])


def looking_at(checkpoint, *more: object) -> list[object]:
    return ["--model", checkpoint, "--image", checkpoint / "picture.png", "--prompt", PROMPT, *more]


def test_balance_counts_the_image_tokens_and_writes_its_report(checkpoint, tmp_path, capsys):
    assert balance(*looking_at(checkpoint, "--out", tmp_path / "report.json")) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["rows_of"]: row["rows"] for row in report["modalities"]}
    # 16 x 16 pixels in patches of 8: four visual tokens.
    assert rows["vision"] == 4
    assert report["patched"] is False
    assert "vision: 4 query rows" in capsys.readouterr().out


def test_balance_with_saved_moda_weights(checkpoint, moda, tmp_path, capsys):
    assert balance(*looking_at(checkpoint, "--moda", moda, "--out", tmp_path / "r.json")) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["patched"] is True
    assert all(row["pseudo_share"] > 0.3 for row in report["modalities"])
    assert "patched model" in capsys.readouterr().out


def test_a_folder_of_pictures_makes_a_page_and_numbers(checkpoint, pictures, tmp_path, capsys):
    page, numbers = tmp_path / "made" / "report.html", tmp_path / "report.json"
    arguments = ("--model", checkpoint, "--images", pictures, "--prompt", PROMPT, "--max-new-tokens", 3)
    assert balance(*arguments, "--out", page, "--out", numbers) == 0
    shown = capsys.readouterr()
    assert "3 inputs" in shown.out
    assert f"written: {page}" in shown.out
    assert [row["inputs"] for row in json.loads(numbers.read_text())["modalities"]] == [3, 3]
    text = page.read_text(encoding="utf-8")
    for section in ("At a glance", "Layer by layer", "Head by head", "On the image", "Word by word", "Key space"):
        assert f"<h2>{section}</h2>" in text
    # Two of three are shown, in the order of their names.
    assert re.findall(r"<h3>(\S+):", text) == ["a.JPG", "b.png"]
    assert "3 of " in text


def test_a_model_is_compared_with_itself_without_moda(checkpoint, moda, pictures, tmp_path, capsys):
    arguments = ("--model", checkpoint, "--moda", moda, "--compare-with", checkpoint, "--max-new-tokens", 0)
    files = ("--out", tmp_path / "r.html", "--out", tmp_path / "r.json")
    assert balance(*arguments, "--images", pictures, "--prompt", PROMPT, "--limit", 2, *files) == 0
    printed = capsys.readouterr().out
    assert "without MODA → with MODA; 2 inputs, paired" in printed
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["before"]["patched"], written["after"]["patched"]) == (False, True)
    assert written["before"]["modalities"][0]["inputs"] == 2
    share = written["changes"][0]["pseudo_share"]
    assert share["before"] == 0 < share["after"] == pytest.approx(share["difference"])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Word by word" not in text
    assert text.count("<b>without MODA</b>") == text.count("<b>with MODA</b>") == 2


def test_two_checkpoints_are_compared(checkpoint, tmp_path, capsys):
    other = tmp_path / "other" / "llava-b"
    shutil.copytree(checkpoint, other)
    assert balance(*looking_at(checkpoint, "--compare-with", other)) == 0
    printed = capsys.readouterr().out
    assert f"llava-b → {checkpoint.name}; one input" in printed
    assert "+0.00 points" in printed


def test_a_data_file_brings_prompts_and_answers(checkpoint, pictures, tmp_path, capsys):
    lines = [
        {"image": str(pictures / "b.png"), "prompt": PROMPT, "answer": "this digit"},
        {"image": "near.png", "prompt": "which digit is this ?"},
    ]
    shutil.copy(pictures / "b.png", tmp_path / "near.png")
    data = tmp_path / "data.jsonl"
    data.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert balance("--model", checkpoint, "--data", data, "--out", tmp_path / "r.json") == 0
    assert "text (answer rows): 2 query rows" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["modalities"][0]["inputs"] == 2
    assert report["answers"][0]["inputs"] == 1


def test_an_answer_is_what_the_labels_say(checkpoint):
    model, processor = load_checkpoint(str(checkpoint))
    picture = checkpoint / "picture.png"
    without = model_inputs(model, processor, Example(picture, PROMPT))
    inputs = model_inputs(model, processor, Example(picture, PROMPT, "this digit ?"))
    answer = processor.tokenizer("this digit ?", add_special_tokens=False)["input_ids"]
    assert len(answer) == 3
    assert inputs["input_ids"][0].tolist() == without["input_ids"][0].tolist() + answer
    assert inputs["labels"][0].tolist() == [-100] * without["input_ids"].shape[1] + answer
    assert inputs["attention_mask"].all()
    assert torch.equal(inputs["pixel_values"], without["pixel_values"])
    assert attention_balance(model, **inputs).of(0, answers_only=True).rows == 3


BAD_LINES = {
    "{": r"line 2: not JSON: .* at column",
    "[1]": r"line 2: list given; an object with 'image', 'prompt', 'answer' \(optional\) wanted",
    '{"image": "x.png"}': "line 2: no 'prompt'; ",
    '{"image": "x.png", "prompt": 3}': "line 2: 'prompt' is int; a string wanted",
    '{"image": "x.png", "prompt": "?", "question": "?"}': "line 2: unknown field 'question'; ",
    '{"image": "absent.png", "prompt": "?"}': r"line 2: no such picture: .*absent\.png",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(line, tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(b"")
    data = tmp_path / "data.jsonl"
    data.write_text('{"image": "x.png", "prompt": "?"}\n' + line)
    assert balance("--model", "unused", "--data", data) == 1
    message = capsys.readouterr().err
    assert message.startswith("moda-attn balance: ")
    assert re.search(BAD_LINES[line], message)


def test_nothing_to_measure_is_said_before_a_checkpoint_is_loaded(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    cases = {
        ("--images", tmp_path / "absent", "--prompt", "?"): "absent: no such file or folder",
        ("--images", tmp_path / "folder", "--prompt", "?"): "no picture in this folder; .png, .jpg",
        ("--data", tmp_path / "absent.jsonl"): "absent.jsonl",
        ("--data", tmp_path / "empty.jsonl"): "no examples; one JSON object a line wanted",
    }
    for arguments, message in cases.items():
        assert balance("--model", "unused", *arguments) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--images together with --prompt wanted, or --data"),
        (("--images", "x"), "--images together with --prompt wanted, or --data"),
        (("--data", "x", "--prompt", "?"), "--data brings its own"),
        (("--data", "x", "--out", "report.pdf"), "report.pdf: a name that ends in .html or .json wanted"),
        (("--data", "x", "--compare-with", "m"), "--compare-with is the model itself; give --moda"),
    ],
)
def test_requests_that_cannot_be_meant(arguments, message, capsys):
    assert balance("--model", "m", *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_image_whose_tokens_lie_nobody_knows_how_has_no_map_and_says_so(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "_sizes_of_a_view", lambda _: iter(()))
    arguments = looking_at(checkpoint, "--out", tmp_path / "r.html", "--max-new-tokens", 0)
    assert balance(*arguments) == 0
    assert re.search(r"no heat map of .*picture\.png: .* how they lie is not known", capsys.readouterr().err)
    assert "On the image" not in (tmp_path / "r.html").read_text(encoding="utf-8")
