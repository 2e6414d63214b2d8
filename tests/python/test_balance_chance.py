"""The level of chance: against dense even attention, and against models whose attention is even."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.analysis import (
    attention_balance,
    balance_of_masses,
    balance_over,
    generation_balance,
    received_attention,
)
from moda_attn.analysis.chance import chance_masses
from moda_attn.config import TEXT, VISION
from moda_attn.errors import ModaValueError


def dense(groups: np.ndarray, queries: np.ndarray, visible: np.ndarray, modalities: list[int], split: bool):
    """(B, Nq, G), a row and a key at a time."""
    result = np.zeros((*queries.shape, len(modalities)))
    for row, query in np.ndindex(*queries.shape):
        if queries[row, query] < 0:
            continue
        seen = [int(group) for group, see in zip(groups[row], visible[row, query], strict=True) if see and group >= 0]
        for group in seen:
            same = [
                other
                for other in seen
                if not split or (modalities[other] == queries[row, query]) == (modalities[group] == queries[row, query])
            ]
            result[row, query, group] += 1 / len(same)
    return result


@pytest.mark.parametrize("combine", ["joint", "split"])
@pytest.mark.parametrize("ranges", ["causal", "given", "one for all rows"])
@pytest.mark.parametrize("modalities", [[0, 1], [0, 1, 2, 0]], ids=str)
def test_chance_is_dense_even_attention(modalities: list[int], ranges: str, combine: str):
    rng = np.random.default_rng(3)
    batch, rows, keys = 3, 7, 11
    groups = rng.integers(-1, len(modalities), (batch, keys))
    queries = rng.integers(-1, max(modalities) + 1, (batch, rows))
    first = rng.integers(0, keys, (1 if ranges == "one for all rows" else batch, rows))
    given = np.stack([first, rng.integers(first, keys + 1)], axis=-1)
    if ranges == "causal":
        given = np.array([[[0, keys - rows + query + 1] for query in range(rows)]])
    places = np.arange(keys)
    visible = (places >= given[..., :1]) & (places < given[..., 1:])
    found = chance_masses(
        groups, queries, None if ranges == "causal" else given, modalities=modalities, combine=combine
    )
    wanted = dense(groups, queries, np.broadcast_to(visible, (batch, rows, keys)), modalities, combine == "split")
    assert found == pytest.approx(wanted)
    assert 0 < found.max() <= 1


def looks_everywhere(model: nn.Module) -> nn.Module:
    """The same model with queries of zero: every score is 0."""
    queries = [part for name, part in model.named_modules() if name.endswith(("self_attn.q_proj", "self_attn.q_norm"))]
    assert queries
    with torch.no_grad():
        for part in queries:
            for parameter in part.parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_model_that_looks_everywhere_is_at_chance(family: str, pad: str):
    """Whatever keys its layers let it see: windows, blocks that see both ways."""
    model, x = looks_everywhere(tiny.build(family)), tiny.inputs(family, ["TTITTTTTTTT", "TITTT"], pad=pad)
    report = attention_balance(model, **x)
    for row in report.modalities:
        assert row.chance.self_mass == pytest.approx(row.self_mass, abs=1e-5)
        assert row.chance.cross_mass == pytest.approx(row.cross_mass, abs=1e-5)
        assert row.chance.mass == pytest.approx(row.mass.mean(1)[:, :-1], abs=1e-5)
        assert row.chance.disparity == pytest.approx(row.disparity, abs=1e-5)
        assert row.chance.relative_disparity == pytest.approx(row.relative_disparity, abs=1e-5)
        assert row.lift == pytest.approx(1, abs=1e-4)
    received = received_attention(model, **x)
    for kind, given in received.mass.items():
        assert received.chance[kind] == pytest.approx(given, abs=1e-5, nan_ok=True)
    assert 0.05 < report.of(TEXT).chance.cross_mass[-1] < 0.95


@pytest.mark.parametrize("combine", ["joint", "split"])
def test_pseudo_scores_take_from_both_sides_of_chance(combine: str):
    model, x = tiny.build(), tiny.inputs("llava-llama", "ITTTTTT")
    moda_attn.apply(model, ModaConfig(combine=combine, location_prior=False, base=-1.0))
    row = attention_balance(looks_everywhere(model), **x).of(TEXT)
    assert row.pseudo_share > 0.1
    assert row.chance.mass.sum(1) == pytest.approx(1 if combine == "joint" else 2)
    assert all(measured < 0.9 * even for measured, even in zip(row.cross_mass, row.chance.cross_mass, strict=True))
    # What they leave is shared as at chance; rows of which they leave less count less.
    assert row.lift == pytest.approx(1, abs=0.1)


def test_tokens_receive_as_little_of_split_attention_at_chance():
    model, x = tiny.build(), tiny.inputs("llava-llama", ["TTITTTTTT", "TTTITT"])
    x["labels"] = x["input_ids"].clone()
    x["labels"][:, :-2] = -100
    x["labels"][1] = -100
    moda_attn.apply(model, ModaConfig(combine="split", mask="none", location_prior=False))
    received = received_attention(looks_everywhere(model), **x)
    assert len(received.mass) == 3
    for kind, given in received.mass.items():
        assert received.chance[kind] == pytest.approx(given, abs=1e-5, nan_ok=True)
    assert np.isnan(received.chance_of(TEXT, answers_only=True)[:, 1]).all()


def test_windows_have_a_chance_of_their_own():
    report = attention_balance(tiny.build("gemma3"), **tiny.inputs("gemma3", "TI" + 12 * "T"))
    windowed, _, full = report.of(TEXT).chance.cross_mass
    assert 0 < windowed < full


def test_the_lift_of_known_masses():
    # A row of text behind three image tokens: at chance three quarters lie on the image, here one quarter.
    mass = np.zeros((1, 2, 4, 3))
    mass[..., 3, :] = [0.6, 0.2, 0.2]
    mass[..., :3, :] = [0, 1, 0]
    report = balance_of_masses([mass, mass], np.array([[1, 1, 1, 0]]))
    text, vision = report.of(TEXT), report.of(VISION)
    assert (text.chance.self_mass, text.chance.cross_mass) == ((0.25, 0.25), (0.75, 0.75))
    assert text.chance.disparity == text.chance.relative_disparity == 0.5
    assert text.lift == pytest.approx(0.25 / 0.75)
    assert np.isnan(vision.lift)
    written = json.loads(report.to_json())["modalities"]
    assert written[0]["chance"] == {
        "self": [0.25, 0.25],
        "cross": [0.75, 0.75],
        "mass": [[0.25, 0.75]] * 2,
        "disparity": 0.5,
        "relative_disparity": 0.5,
    }
    assert written[1]["lift"] is None
    assert "  chance   0.250   0.750   0.000         0.500" in str(report)


def test_chance_of_another_shape_raises():
    with pytest.raises(ModaValueError, match=r"chance has shapes \[\(1, 4, 3\)\]; \(1, 4, 2\), \(B, Nq, M\), wanted"):
        balance_of_masses([np.zeros((1, 2, 4, 3))], np.zeros((1, 4), dtype=int), chance=[np.zeros((1, 4, 3))])


def test_chance_over_a_data_set_is_that_of_one_batch():
    model = tiny.build()
    parts = [tiny.inputs("llava-llama", row) for row in ("TTITTT", "TITTTTITT")]
    over = balance_over(model, parts)
    together = attention_balance(model, **tiny.inputs("llava-llama", ["TTITTT", "TITTTTITT"]))
    for row, other in zip(over.every, together.every, strict=True):
        assert row.chance.mass == pytest.approx(other.chance.mass)
        assert row.chance == other.chance
    grouped = over.grouped_by(["a", "a"])
    assert grouped.of(TEXT).chance.mass == pytest.approx(over.of(TEXT).chance.mass)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("combine", [None, "split"])
def test_generated_tokens_have_their_chance(combine: str | None, beams: int):
    model, x = tiny.build(), tiny.inputs("llava-llama", ["TTITTT", "TIT"])
    if combine is not None:
        moda_attn.apply(model, ModaConfig(combine=combine, mask="none", location_prior=False))
    looks_everywhere(model)
    plain = {"do_sample": False, "suppress_tokens": list(range(tiny.TEXT_END, tiny.VOCABULARY)), "num_beams": beams}
    answer = generation_balance(model, **x, max_new_tokens=4, **plain)
    assert answer.chance == pytest.approx(answer.mass, abs=1e-5)
    if combine is None:
        # Of the shorter row: two words and four image tokens, and what was generated before.
        assert answer.chance[0, 1, :, VISION] == pytest.approx([4 / (6 + before) for before in range(4)])
        assert json.loads(answer.to_json())["chance"][0][1][0] == pytest.approx([2 / 6, 4 / 6, 0, 0])
