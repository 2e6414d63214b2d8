"""The balance over a data set: the same as of one large batch, with its inputs counted as they are independent."""

from __future__ import annotations

import math

import pytest

from moda_attn.analysis import attention_balance, balance_over, compare
from moda_attn.analysis.measures import MEASURES
from moda_attn.demo.data import ask_all, load_digits, training_batch
from moda_attn.demo.model import build_model
from moda_attn.demo.tokenizer import WordTokenizer
from moda_attn.errors import ModaValueError


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, seed=3)


@pytest.fixture(scope="module")
def batches(tokenizer):
    test = load_digits()["test"]
    questions = ask_all(test, seed=5)[::124]
    return [training_batch(questions[at : at + 4], test, tokenizer) for at in range(0, 16, 4)], training_batch(
        questions[:16], test, tokenizer
    )


def test_a_data_set_gives_what_one_large_batch_gives(model, batches):
    parts, whole = batches
    over, one = balance_over(model, iter(parts)), attention_balance(model, **whole)
    assert over.layers == one.layers
    for row, other in zip(over.every, one.every, strict=True):
        assert (row.name, row.rows, row.inputs) == (other.name, other.rows, other.inputs)
        assert row.inputs == 16
        assert row.mass == pytest.approx(other.mass, abs=1e-5)
        assert row.self_mass == pytest.approx(other.self_mass, abs=1e-5)
        for name in MEASURES:
            assert getattr(row, name) == pytest.approx(getattr(other, name), rel=2e-3)
            assert row.intervals[name] == pytest.approx(other.intervals[name], rel=2e-2)


def test_batches_can_be_the_independent_inputs(model, batches):
    parts, _ = batches
    rows, whole = balance_over(model, parts), balance_over(model, parts, independent="batches")
    assert (rows.of(0).inputs, whole.of(0).inputs) == (16, 4)
    assert rows.of(0).disparity == pytest.approx(whole.of(0).disparity)
    assert rows.of(0).intervals["disparity"] != whole.of(0).intervals["disparity"]
    single = balance_over(model, parts[:1], independent="batches")
    assert math.isnan(single.of(0).intervals["disparity"].low)


def test_inputs_without_answers_or_labels_count_for_the_other_rows(model, batches):
    parts, _ = batches
    unlabelled = {name: value for name, value in parts[0].items() if name != "labels"}
    report = balance_over(model, [unlabelled, *parts[1:]])
    assert report.of(0).inputs == 16
    assert report.of(0, answers_only=True).inputs == 12
    only = balance_over(model, parts[1:])
    assert report.of(0, answers_only=True).disparity == pytest.approx(only.of(0, answers_only=True).disparity)


def test_a_model_compared_with_itself_has_not_changed(model, batches):
    parts, _ = batches
    one, other = balance_over(model, parts), balance_over(model, parts)
    for row in compare(one, other).rows:
        for name in ("disparity", "relative_disparity", "pseudo_share"):
            assert tuple(row.changes[name]) == (0, 0, 0)
        assert tuple(row.changes["decay"]) == (1, 1, 1)


def test_questions_about_one_picture_can_be_grouped_afterwards(model, batches):
    parts, whole = batches
    grouped = attention_balance(model, **whole).grouped_by([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4)
    batchwise = balance_over(model, parts, independent="batches")
    for row, other in zip(grouped.every, batchwise.every, strict=True):
        assert (row.inputs, row.rows) == (other.inputs, other.rows)
        assert row.disparity == pytest.approx(other.disparity, rel=1e-4)
        assert row.intervals["disparity"] == pytest.approx(other.intervals["disparity"], rel=2e-2)
    with pytest.raises(ModaValueError, match="groups has 3 entries; one for each of 16 inputs wanted"):
        attention_balance(model, **whole).grouped_by([0, 1, 2])


def test_no_inputs_and_unknown_words_raise(model):
    with pytest.raises(ModaValueError, match="no inputs"):
        balance_over(model, iter(()))
    with pytest.raises(ModaValueError, match='\'heads\'; "rows" or "batches" wanted'):
        balance_over(model, [], independent="heads")
