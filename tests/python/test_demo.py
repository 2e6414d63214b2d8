"""The demo in short: its data, its questions, its words, its model, and a few steps of all of it."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
import torch

import moda_attn
from moda_attn.demo import leak, run
from moda_attn.demo.data import (
    IGNORE,
    KINDS,
    NUM_VISUAL_TOKENS,
    SPLIT_SIZES,
    Digits,
    ask,
    ask_all,
    load_digits,
    prompt_batch,
    training_batch,
    training_stream,
)
from moda_attn.demo.evaluate import (
    Score,
    generate_answers,
    scores_by_kind,
    teacher_forced,
    text_only_ceiling,
    wilson_interval,
)
from moda_attn.demo.looks import page_of
from moda_attn.demo.model import build_model
from moda_attn.demo.picture import draw
from moda_attn.demo.summary import summary
from moda_attn.demo.timing import alternating_step_ms
from moda_attn.demo.tokenizer import DIGIT_WORDS, INK_WORDS, WordTokenizer
from moda_attn.demo.train import Recipe, parameter_groups, train

ALL_KINDS = (*KINDS, "ink")
SHORT = Recipe(steps=4, batch_size=8)
HELD_OUT = 50


@pytest.fixture(scope="module")
def parts():
    return load_digits()


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="module")
def short_run(parts):
    """A run of a few steps, measured on the first fifty held-out scans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_digits", lambda: {**parts, "test": first(parts["test"], HELD_OUT)})
        return run.run_demo(SHORT, leak_steps=3)


def first(part, count):
    return Digits(part.pixels[:count], part.scans[:count], part.labels[:count], part.indices[:count])


def test_the_split_is_disjoint_complete_and_fixed(parts):
    indices = [set(part.indices.tolist()) for part in parts.values()]
    assert {name: len(part) for name, part in parts.items()} == SPLIT_SIZES
    assert set.union(*indices) == set(range(1797))
    assert sum(map(len, indices)) == 1797
    again = load_digits()
    assert all(torch.equal(parts[name].pixels, again[name].pixels) for name in parts)
    # Every digit is held out often enough to be measured.
    assert min(np.bincount(parts["test"].labels)) >= 30


def test_pixels_are_standardised_by_the_training_part_and_keep_their_labels(parts):
    from sklearn.datasets import load_digits as load_scans

    train_pixels = parts["train"].pixels.view(SPLIT_SIZES["train"], -1).double()
    deviations = train_pixels.std(0, unbiased=False)
    assert train_pixels.mean(0).abs().max() < 1e-5
    assert all(value < 1 or value == pytest.approx(1, abs=1e-5) for value in deviations.tolist())
    scans, labels = load_scans(return_X_y=True)
    for part in parts.values():
        assert np.array_equal(part.scans.reshape(-1, 64), scans[part.indices])
        assert np.array_equal(part.labels, labels[part.indices])


def truth(text: str, digit: int) -> str:
    """The right answer, worked out from the question's words alone and the digit; shares no code with the demo."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    if text == "which digit is this ?":
        return names[digit]
    if match := re.fullmatch(r"is this (an?) (\w+) \?", text):
        assert (match[1] == "an") == (match[2][0] in "aeiou" and match[2] != "one")
        return "yes" if match[2] == names[digit] else "no"
    if match := re.fullmatch(r"is it greater than (\w+) \?", text):
        return "yes" if digit > names.index(match[1]) else "no"
    match = re.fullmatch(r"caption : the digit is (\w+) \.", text)
    return "true" if match[1] == names[digit] else "false"


def test_every_answer_is_the_truth(parts):
    for name in ("train", "test"):
        for question in ask_all(parts[name], seed=11):
            assert question.answer == truth(question.text, int(parts[name].labels[question.item])), question


def test_yes_and_no_questions_are_balanced(parts):
    questions = ask_all(parts["train"], seed=12)
    for kind, positive in (("is", "yes"), ("caption", "true")):
        rate = np.mean([question.answer == positive for question in questions if question.kind == kind])
        assert 0.42 < rate < 0.58
    assert text_only_ceiling(questions)["greater"] < 0.70


def test_the_ink_is_unknowable(parts):
    rng = random.Random(0)
    drawn = [ask(parts["test"], 0, "ink", rng).answer for _ in range(4000)]
    counts = np.array([drawn.count(colour) for colour in INK_WORDS])
    assert len(INK_WORDS) == 8
    assert np.abs(counts - 500).max() < 100


def test_the_stream_opens_with_which_digit_and_is_reproducible(parts):
    batches = list(training_stream(parts["train"], 64, 40, seed=1))
    early = [question.kind for batch in batches[:6] for question in batch]
    late = [question.kind for batch in batches[6:] for question in batch]
    assert early.count("which") / len(early) > 0.7
    assert all(0.2 < late.count(kind) / len(late) < 0.3 for kind in KINDS)
    assert batches == list(training_stream(parts["train"], 64, 40, seed=1))
    assert batches != list(training_stream(parts["train"], 64, 40, seed=2))


def test_tokenizer_round_trip(parts, tokenizer):
    assert len(set(tokenizer.words)) == len(tokenizer)
    for question in ask_all(parts["validation"], seed=3, kinds=ALL_KINDS):
        for text in (question.text, question.answer):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    marked = [tokenizer.begin_id, tokenizer.image_id, *tokenizer.encode("is this </s> six")]
    assert tokenizer.decode(marked) == "is this"
    with pytest.raises(KeyError):
        tokenizer.encode("which cat")


def test_training_batch_supervises_the_answer_and_its_end_mark_only(parts, tokenizer):
    questions = ask_all(parts["test"], seed=4)[::97]
    batch = training_batch(questions, parts["test"], tokenizer)
    assert batch["pixel_values"].shape == (len(questions), 1, 8, 8)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    for row, question in enumerate(questions):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        supervised = labels != IGNORE
        assert torch.equal(labels[supervised], ids[supervised])
        assert labels[supervised].tolist() == [*tokenizer.encode(question.answer), tokenizer.end_id]
        assert (ids == tokenizer.image_id).sum() == NUM_VISUAL_TOKENS
        assert tokenizer.decode(ids.tolist()) == f"{question.text} {question.answer}"
        assert torch.equal(batch["pixel_values"][row], parts["test"].pixels[question.item])


def test_prompts_are_left_padded_and_hold_no_answer(parts, tokenizer):
    questions = ask_all(parts["test"], seed=4)[::97]
    batch = prompt_batch(questions, parts["test"], tokenizer)
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"].all()
    for row, question in enumerate(questions):
        assert tokenizer.decode(batch["input_ids"][row].tolist()) == question.text


def test_wilson_interval():
    # The end points solve (rate - p)^2 = z^2 p (1 - p) / n.
    low, high = wilson_interval(480, 497)
    for end in (low, high):
        assert abs(480 / 497 - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / 497))
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(0, 10)[1] > 0.2


def test_text_only_ceiling_takes_the_commonest_answer_of_each_text(parts):
    questions = ask_all(parts["test"], seed=6)
    ceiling = text_only_ceiling(questions)
    assert ceiling["which"] == max(np.bincount(parts["test"].labels)) / len(parts["test"])
    assert 0.5 <= ceiling["is"] < 0.65
    assert 0.5 <= ceiling["caption"] < 0.65


def test_the_model_has_the_size_and_the_shape_it_claims(tokenizer):
    model = build_model(tokenizer, seed=0)
    assert 220_000 < sum(parameter.numel() for parameter in model.parameters()) < 235_000
    assert len(model.model.language_model.layers) == 4
    assert model.lm_head.weight is model.get_input_embeddings().weight
    same, other = build_model(tokenizer, seed=0), build_model(tokenizer, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_weight_decay_spares_moda_and_covers_every_parameter_once(tokenizer):
    model = build_model(tokenizer, seed=0)
    moda_attn.apply(model, moda_attn.ModaConfig())
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    ids = [id(parameter) for group in (decayed, free) for parameter in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    moda = {id(parameter) for name, parameter in model.named_parameters() if ".moda." in name}
    assert moda
    assert moda <= {id(parameter) for parameter in free["params"]}


def test_timing_takes_turns_and_leaves_the_weights_alone(parts, tokenizer):
    models = {name: build_model(tokenizer, seed=0) for name in ("one", "two")}
    turns = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: turns.append(name))
    before = [parameter.clone() for parameter in models["one"].parameters()]
    batch = training_batch(ask_all(parts["test"], seed=1)[:4], parts["test"], tokenizer)
    times = alternating_step_ms(models, batch, rounds=2)
    assert turns == ["one", "two"] * 5
    assert all(value > 0 for value in times.values())
    assert all(torch.equal(a, b) for a, b in zip(before, models["one"].parameters(), strict=True))
    assert all(parameter.grad is None for parameter in models["one"].parameters())


def test_learning_rate_rises_stays_and_falls():
    recipe = Recipe(steps=100, warmup=0.1, decay=0.4, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == rates[55] == 1.0
    assert rates[80] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.03


def test_training_lowers_the_loss_and_repeats_exactly(parts, tokenizer):
    recipe = Recipe(steps=25, batch_size=16, kinds=("which",))
    logs, models = [], []
    for _ in range(2):
        models.append(build_model(tokenizer, seed=0))
        moda_attn.apply(models[-1], moda_attn.ModaConfig())
        logs.append(train(models[-1], parts["train"], tokenizer, recipe, "short"))
    assert logs[0] == logs[1]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert len(logs[0]) == recipe.steps
    assert np.mean(logs[0][-5:]) < 0.6 * logs[0][0]


class Scripted(torch.nn.Module):
    """Stands for a model that generates fixed ids."""

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__()
        self.rows = rows

    def generate(self, input_ids, max_new_tokens, **_):
        self.seen, self.max_new_tokens = input_ids, max_new_tokens
        return torch.cat([input_ids, torch.tensor(self.rows)], dim=1)


def test_generated_answers_are_what_follows_the_prompt(parts, tokenizer):
    questions = [question for question in ask_all(parts["test"], seed=1) if question.item == 0][:2]
    end = [tokenizer.end_id]
    model = Scripted([tokenizer.encode("seven") + end, tokenizer.encode("yes no")])
    assert generate_answers(model, questions, parts["test"], tokenizer) == ["seven", "yes no"]
    assert model.max_new_tokens == 2
    assert not any(word in DIGIT_WORDS for word in tokenizer.decode(model.seen[0].tolist()).split())


def test_teacher_forced_agrees_with_the_models_own_loss(parts, tokenizer):
    model = build_model(tokenizer, seed=2).eval()
    questions = ask_all(parts["test"], seed=1)[::300]
    result = teacher_forced(model, questions, parts["test"], tokenizer)
    batch = training_batch(questions, parts["test"], tokenizer)
    batch["labels"][batch["labels"] == tokenizer.end_id] = IGNORE
    with torch.no_grad():
        assert result.loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert len(result.right) == len(questions)


def test_scores_are_counted_by_kind(parts):
    questions = ask_all(parts["validation"], seed=1)
    scores = scores_by_kind(questions, [question.kind == "is" or question.item == 0 for question in questions])
    assert scores["is"] == Score(200, 200)
    assert scores["caption"] == Score(1, 200)


def test_a_short_run_measures_everything(short_run):
    assert set(short_run.models) == {"unpatched", "patched_untrained", "moda", "leaky"}
    for result in short_run.models.values():
        assert list(result.generated) == list(result.forced) == list(KINDS)
        assert all(score.total == HELD_OUT for score in result.generated.values())
        assert result.balance.layers == (0, 1, 2, 3)
    plain, moda = short_run.models["unpatched"], short_run.models["moda"]
    assert plain.balance.of(0).pseudo_share == 0 < moda.balance.of(0).pseudo_share
    assert plain.parameters < moda.parameters < 1.05 * plain.parameters
    assert [example.question.kind for example in short_run.examples] == [*KINDS, *KINDS]
    assert {len(outcome.losses) for outcome in short_run.unknowable.values()} == {3}


def test_examples_show_what_the_models_said(short_run, parts, tokenizer):
    questions = ask_all(first(parts["test"], HELD_OUT), SHORT.seed + 1)
    for example in short_run.examples:
        place = questions.index(example.question)
        assert example.said["moda"] == short_run.models["moda"].said[place]


def test_results_are_valid_json(short_run):
    written = json.loads(json.dumps(short_run.to_dict(), allow_nan=False))
    assert written["recipe"]["steps"] == 4
    assert set(written["step_ms"]) == {"unpatched", "moda"}
    kind = written["models"]["moda"]["generated"]["which"]
    assert kind["low"] <= kind["accuracy"] == kind["correct"] / kind["total"] <= kind["high"]
    assert written["unknowable"]["loss_floor"] == pytest.approx(math.log(8))


def test_summary_says_what_the_run_shows(short_run):
    text = summary(short_run)
    score = short_run.models["moda"].generated["which"]
    assert f"{score.accuracy:.1%} [{score.interval[0]:.1%}, {score.interval[1]:.1%}]" in text
    assert f"{short_run.unknowable['all'].forced_loss:.3f}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_picture_is_drawn(short_run, tmp_path):
    from PIL import Image

    draw(short_run, tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size[0] > 1200
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_the_report_of_both_models_is_written(short_run, tmp_path):
    text = page_of(short_run).write(tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(text) < 500_000
    for name in ("unpatched", "moda"):
        balance = short_run.models[name].balance.of(0)
        # Four questions about a scan are one input.
        assert balance.inputs == HELD_OUT
        assert f"{100 * balance.disparity:.2f}\N{NO-BREAK SPACE}%" in text
    looks = short_run.looks
    assert [set(image.heat) for image in looks.images] == [{"unpatched", "MODA"}] * 2
    assert all(heat.shape == (4, 2, 2) for image in looks.images for heat in image.heat.values())
    assert len(looks.answers) == 4
    assert all(len(answer.words) == answer.balance.mass.shape[2] for answer in looks.answers)
    assert looks.keys["unpatched"].after is None
    assert looks.keys["MODA"].after is not None


def test_an_answer_reaches_earlier_logits_with_context_all_and_never_with_prompt(parts, tokenizer):
    """The mechanism of the leak, before any training: change the answer, watch the row that must predict it."""
    question = ask_all(parts["test"], seed=1, kinds=("ink",))[0]
    batch = training_batch([question], parts["test"], tokenizer)
    place = int((batch["labels"][0] != IGNORE).nonzero()[0, 0])
    other = {**batch, "input_ids": batch["input_ids"].clone(), "labels": batch["labels"].clone()}
    changed = INK_WORDS[(INK_WORDS.index(question.answer) + 1) % 8]
    other["input_ids"][0, place] = other["labels"][0, place] = tokenizer.encode(changed)[0]
    moved = {}
    for context in ("prompt", "all"):
        model = build_model(tokenizer, seed=0).eval()
        moda_attn.apply(model, moda_attn.ModaConfig(context=context))
        with torch.no_grad():
            for layer in model.model.language_model.layers:
                layer.self_attn.moda.aligner.fuser.mix.normal_()
            moved[context] = (model(**batch).logits - model(**other).logits)[:, :place].abs().max().item()
    assert moved["prompt"] == 0
    assert moved["all"] > 1e-3


def test_unknowable_questions_keep_an_honest_model_at_the_floor(parts, tokenizer):
    outcome = leak.train_unknowable("prompt", parts, tokenizer, Recipe(steps=60, batch_size=32))
    assert np.mean(outcome.losses[-10:]) > 0.95 * leak.LOSS_FLOOR
    assert outcome.generated.interval[0] < leak.CHANCE + 0.05
