"""Attention balance: known values, recovered decay, agreement with dense attention, and what it leaves untouched."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import moda_attn
from moda_attn.analysis import attention_balance, balance_of_masses
from moda_attn.analysis.measures import log_slope
from moda_attn.demo.data import ask_all, load_digits, training_batch
from moda_attn.demo.model import build_model
from moda_attn.demo.tokenizer import WordTokenizer
from moda_attn.errors import ModaValueError


def constant_mass(*columns: float, batch: int = 2, heads: int = 3, rows: int = 4) -> np.ndarray:
    """Mass on the keys of each modality, text first, and on the pseudo-scores."""
    return np.broadcast_to(columns, (batch, heads, rows, len(columns)))


def test_known_values_of_two_layers():
    masses = [constant_mass(0.7, 0.2, 0.1), constant_mass(0.2, 0.3, 0.5)]
    report = balance_of_masses(masses, np.zeros((2, 4), dtype=int))
    text = report.of(0)
    assert text.rows == 8
    assert text.self_mass == pytest.approx((0.7, 0.2))
    assert text.cross_mass == pytest.approx((0.2, 0.3))
    assert text.disparity == pytest.approx((0.5 + 0.1) / 2)
    assert text.relative_disparity == pytest.approx((0.5 / 0.9 + 0.1 / 0.5) / 2)
    assert text.pseudo_share == pytest.approx(0.3)
    assert text.decay == pytest.approx(1.5)
    assert text.error == pytest.approx((1.5 * 0.5) * (1.5**2 * 0.1))


def test_rows_are_split_by_modality_and_padding_is_left_out():
    mass = np.zeros((1, 2, 4, 3))
    mass[0, :, 0] = [1, 0, 0]
    mass[0, :, 1] = [0.5, 0.25, 0.25]
    mass[0, 0, 2], mass[0, 1, 2] = [0.8, 0.2, 0], [0.6, 0.4, 0]
    mass[0, :, 3] = np.nan
    report = balance_of_masses([mass], np.array([[0, 0, 1, -1]]))
    assert [balance.modality for balance in report.modalities] == [0, 1]
    assert report.of(0).self_mass == pytest.approx((0.75,))
    assert report.of(1).cross_mass == pytest.approx((0.7,))
    assert report.of(1).mass == pytest.approx(np.array([[[0.8, 0.2, 0], [0.6, 0.4, 0]]]))
    assert report.of(1).columns == ("text", "vision", "pseudo")
    with pytest.raises(KeyError, match="modality 4"):
        report.of(4)


def test_answer_rows_alone():
    mass = np.zeros((1, 1, 3, 3))
    mass[0, 0] = [[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.5, 0.25]]
    answers = np.array([[False, False, True]])
    report = balance_of_masses([mass], np.zeros((1, 3), dtype=int), answer_rows=answers)
    assert report.of(0).rows == 3
    answer = report.of(0, answers_only=True)
    assert (answer.rows, answer.disparity, answer.pseudo_share) == (1, 0.25, 0.25)
    assert answer.relative_disparity == pytest.approx(1 / 3)


def decay_of(cross: np.ndarray, layers) -> float:
    return float(np.exp(log_slope(cross, layers)))


@pytest.mark.parametrize("gamma", [0.4, 0.97, 1.3])
def test_synthetic_decay_is_recovered(gamma):
    layers = np.arange(12)
    assert decay_of(0.3 * gamma**layers, layers) == pytest.approx(gamma, rel=1e-12)
    noisy = 0.3 * gamma**layers * np.exp(np.random.default_rng(0).normal(0, 0.01, 12))
    assert decay_of(noisy, layers) == pytest.approx(gamma, rel=0.01)


def test_decay_counts_layer_indices_not_entries():
    layers = np.array([0, 3, 4, 9])
    assert decay_of(0.2 * 0.8**layers, layers) == pytest.approx(0.8)


@pytest.mark.parametrize("cross", [[0.3], [0.3, 0.0, 0.1]])
def test_decay_without_a_slope_is_nan_and_null_in_json(cross):
    assert math.isnan(decay_of(np.array(cross), range(len(cross))))
    report = balance_of_masses([constant_mass(0.5, value, 0) for value in cross], np.zeros((2, 4), dtype=int))
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["modalities"][0]["decay"] is None


def test_a_layer_owned_by_the_pseudo_scores_shows_no_preference():
    report = balance_of_masses([constant_mass(0, 0, 1)], np.zeros((2, 4), dtype=int))
    assert (report.of(0).relative_disparity, report.of(0).pseudo_share) == (0, 1)


@pytest.mark.parametrize(
    ("masses", "modality", "answers"),
    [
        ([], (2, 4), None),
        ([np.zeros((2, 3, 4, 1))], (2, 4), None),
        ([np.zeros((2, 3, 4, 3)), np.zeros((2, 3, 4, 4))], (2, 4), None),
        ([np.zeros((2, 3, 5, 3))], (2, 4), None),
        ([np.zeros((2, 3, 4, 3))], (2, 4), (2, 5)),
    ],
)
def test_shapes_that_do_not_fit_raise(masses, modality, answers):
    answer_rows = None if answers is None else np.ones(answers, dtype=bool)
    with pytest.raises(ModaValueError, match="wanted"):
        balance_of_masses(masses, np.zeros(modality, dtype=int), answer_rows=answer_rows)


def test_an_id_without_a_column_raises():
    with pytest.raises(ModaValueError, match="id 2; ids below M = 2 wanted"):
        balance_of_masses([constant_mass(0.5, 0.5, 0)], np.full((2, 4), 2))


def test_layers_may_differ_in_their_heads_and_three_modalities_have_their_columns():
    masses = [constant_mass(0.1, 0.2, 0.4, 0.3, heads=2), constant_mass(0.4, 0.2, 0.1, 0.3, heads=3)]
    report = balance_of_masses(masses, np.full((2, 4), 2))
    video = report.of(2)
    assert video.columns == ("text", "vision", "video", "pseudo")
    assert video.mass.shape == (2, 3, 4)
    assert np.isnan(video.mass[0, 2]).all()
    assert not np.isnan(video.mass[1]).any()
    assert video.self_mass == pytest.approx((0.4, 0.1))
    assert video.cross_mass == pytest.approx((0.3, 0.6))
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["modalities"][0]["mass"][0][2] == [None] * 4


def test_the_table_shows_every_layer_and_all_three_numbers():
    report = balance_of_masses([constant_mass(0.7, 0.2, 0.1)] * 5, np.zeros((2, 4), dtype=int), patched=True)
    lines = str(report).splitlines()
    assert lines[0].startswith("Attention balance, patched")
    assert sum(line.split()[:4] == [str(layer), "0.700", "0.200", "0.100"] for layer in range(5) for line in lines) == 5
    assert all(name in lines[-1] for name in ("disparity 0.500", "relative 0.556", "pseudo share 0.100"))


@pytest.fixture(scope="module")
def digits_model():
    tokenizer = WordTokenizer()
    test = load_digits()["test"]
    questions = ask_all(test, seed=5)[::150]
    return build_model(tokenizer, seed=3), training_batch(questions, test, tokenizer)


def dense_masses(model, inputs):
    """Own and other mass of every layer from the attention maps that eager attention returns."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    modality = (inputs["input_ids"] == model.config.image_token_id).long()
    same = (modality[:, :, None] == modality[:, None, :])[:, None]
    real = inputs["attention_mask"].bool()
    result = []
    for probabilities in attentions:
        own, cross = (probabilities * same).sum(-1).mean(1), (probabilities * ~same).sum(-1).mean(1)
        result.append({m: (own[(modality == m) & real].mean(), cross[(modality == m) & real].mean()) for m in (0, 1)})
    return result


def test_unpatched_masses_equal_dense_attention_maps(digits_model):
    model, inputs = digits_model
    report = attention_balance(model, **inputs)
    dense = dense_masses(model, inputs)
    assert not report.patched
    assert report.layers == (0, 1, 2, 3)
    for modality in (0, 1):
        balance = report.of(modality)
        own, cross = zip(*[layer[modality] for layer in dense], strict=True)
        assert balance.self_mass == pytest.approx([float(value) for value in own], abs=1e-5)
        assert balance.cross_mass == pytest.approx([float(value) for value in cross], abs=1e-5)
        assert balance.pseudo_share == 0


def test_answer_rows_are_those_that_predict_labels(digits_model):
    model, inputs = digits_model
    report = attention_balance(model, **inputs)
    assert report.of(0, answers_only=True).rows == int((inputs["labels"] != -100).sum())
    without = {name: value for name, value in inputs.items() if name != "labels"}
    assert attention_balance(model, **without).answers == ()


def test_measuring_leaves_the_model_as_it_was(digits_model):
    model, inputs = digits_model
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        before = model(**inputs).logits
        attention_balance(model, **inputs)
        after = model(**inputs).logits
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(before, after)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_patched_model_shows_its_pseudo_share_and_masses_sum_to_one(digits_model):
    model, inputs = digits_model
    moda_attn.apply(model, moda_attn.ModaConfig())
    try:
        report = attention_balance(model, **inputs)
    finally:
        moda_attn.remove(model)
    assert report.patched
    for balance in (*report.modalities, *report.answers):
        assert balance.pseudo_share > 0.01
        sums = np.sum([balance.self_mass, balance.cross_mass, balance.pseudo_mass], axis=0)
        assert sums == pytest.approx(np.ones(4), abs=1e-5)


def test_left_and_right_padding_give_the_same_balance(digits_model):
    model, inputs = digits_model
    shifted = {name: value.clone() for name, value in inputs.items()}
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for name in ("input_ids", "attention_mask", "labels"):
            shifted[name][row] = inputs[name][row].roll(inputs[name].shape[1] - length)
    moda_attn.apply(model, moda_attn.ModaConfig())
    try:
        right, left = attention_balance(model, **inputs), attention_balance(model, **shifted)
    finally:
        moda_attn.remove(model)
    for one, other in zip((*right.modalities, *right.answers), (*left.modalities, *left.answers), strict=True):
        assert one.rows == other.rows
        assert one.self_mass == pytest.approx(other.self_mass, abs=2e-5)
        assert one.cross_mass == pytest.approx(other.cross_mass, abs=2e-5)
