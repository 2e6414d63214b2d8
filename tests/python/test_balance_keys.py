"""The gap between the keys of the modalities: against its formulas, before and after alignment."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

import matrix
import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.analysis import KeyGap, key_space
from moda_attn.analysis.measure import undisturbed
from moda_attn.hf.record import AttentionCall, recording

ROWS = ["TTITTT", "TITTTITT", "TTTT"]


class Calls:
    """Keeps what every layer attended to."""

    def __init__(self) -> None:
        self.labels: Tensor | None = None
        self.calls: dict[int, AttentionCall] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        self.calls[call.index] = call
        return call.attend()[0]


def calls(model: torch.nn.Module, x: dict[str, Tensor]) -> dict[int, AttentionCall]:
    with undisturbed(model), recording(model, Calls()) as recorder:
        model(**x, use_cache=False)
    return recorder.calls


def expected(call: AttentionCall, chosen: Tensor) -> KeyGap:
    """Of text and vision, by NumPy, one row and head at a time."""
    heads = range(call.key.shape[1])
    keys, values = call.key.double().numpy(), call.value.double().numpy()
    results = np.full((3, len(chosen), len(heads), 2, 2), np.nan)
    for row, ids in enumerate(call.state.modality.masked_fill(~chosen, -1).numpy()):
        for head in heads:
            unit = keys[row, head] + 1e-6
            unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
            for a in range(2):
                for b in range(2):
                    if not ((ids == a).any() and (ids == b).any()):
                        continue
                    u, w = unit[ids == a], unit[ids == b]
                    bases = [k.T @ values[row, head][ids == m] for k, m in ((u, a), (w, b))]
                    normed = [basis / np.linalg.norm(basis, axis=-1, keepdims=True) for basis in bases]
                    far = u.mean(0) - w.mean(0)
                    s, t = (np.cov(k.T, bias=True) for k in (u, w))
                    shared = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
                    results[0, row, head, a, b] = (normed[0] * normed[1]).sum() / len(far)
                    results[1, row, head, a, b] = np.linalg.norm(far)
                    results[2, row, head, a, b] = far @ far + np.trace(s) + np.trace(t) - 2 * shared
    return KeyGap(*np.nanmean(results, axis=1))


@pytest.mark.parametrize("with_labels", [False, True])
def test_the_gap_of_an_unpatched_model_follows_its_formulas(with_labels: bool):
    model, x = tiny.build(dtype=torch.float64), tiny.inputs("llava-llama", ROWS)
    x["pixel_values"] = x["pixel_values"].double()
    chosen = x["attention_mask"].bool()
    if with_labels:
        x["labels"] = x["input_ids"].clone()
        x["labels"][:, :-2] = -100
        chosen = chosen & (torch.arange(chosen.shape[1]) < chosen.shape[1] - 2)
    space = key_space(model, **x)
    assert space.layers == (0, 1, 2)
    assert space.after is None
    for layer, call in calls(model, x).items():
        for found, wanted in zip(space.before, expected(call, chosen), strict=True):
            assert found[layer] == pytest.approx(wanted, abs=1e-6)
    diagonals = [values[:, :, range(2), range(2)] for values in space.before]
    for diagonal, value in zip(diagonals, (1, 0, 0), strict=True):
        assert diagonal == pytest.approx(value, abs=1e-6)
    assert space.before.similarity[..., 0, 1] == pytest.approx(space.before.similarity[..., 1, 0])


@pytest.mark.parametrize("config", [ModaConfig(), ModaConfig(aligner="mlp2"), ModaConfig(layers=(1,))], ids=str)
def test_a_patched_model_has_the_gap_before_and_after(config: ModaConfig):
    # In float64: the distance of Fréchet has roots of what may be rounding alone.
    x = tiny.inputs("llava-llama", ROWS)
    x["pixel_values"] = x["pixel_values"].double()
    model = tiny.build(dtype=torch.float64)
    plain = key_space(model, **x, **matrix.positions(model, x))
    moda_attn.apply(model, config)
    tiny.randomise(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    space = key_space(model, **x)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert space.after is not None
    for layer, call in calls(model, x).items():
        for found, wanted in zip(space.after, expected(call, x["attention_mask"].bool()), strict=True):
            assert found[layer] == pytest.approx(wanted, abs=1e-6)
        changed = space.before.distance[layer] != space.after.distance[layer]
        assert changed.any() == (layer in config.layer_indices(3))
    # The first layer is given what an unpatched model gives it.
    for found, wanted in zip(space.before, plain.before, strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    written = json.loads(space.to_json())
    assert np.shape(written["after"]["frechet"]) == (3, 2, 2, 2)
    assert written["modalities"] == ["text", "vision"]


def test_keys_that_are_alike_have_no_gap_and_modalities_without_keys_no_number():
    model, x = tiny.build(), tiny.inputs("llava-llama", "TTTT")
    space = key_space(model, **x)
    assert np.isnan(space.before.distance[..., 0, 1]).all()
    assert not np.isnan(space.before.distance[..., 0, 0]).any()
    # The same tokens over again, said to be the other modality, at the same position.
    twice = {"input_ids": x["input_ids"].repeat(1, 2), "position_ids": torch.arange(4).repeat(2)[None]}
    twice["modality_ids"] = torch.tensor([[0] * 4 + [1] * 4])
    twice["attention_mask"] = torch.ones(1, 8, dtype=torch.long)
    first = KeyGap(*(values[0] for values in key_space(model, **twice).before))
    assert first.distance == pytest.approx(0, abs=1e-6)
    assert first.frechet == pytest.approx(0, abs=1e-5)
    assert first.similarity == pytest.approx(1, abs=1e-5)


def test_what_is_not_aligned_stays_where_it_was():
    model, x = tiny.build(), tiny.inputs("llava-llama", ROWS)
    x |= matrix.positions(model, x)
    moda_attn.apply(model, ModaConfig(fusion="aligned", align=("vision",), mask="none", location_prior=False))
    space = key_space(model, **x)
    assert space.after is not None
    assert not np.allclose(space.after.distance[..., 0, 1], space.before.distance[..., 0, 1])
    aligned, raw = (text_keys(model, x, patched) for patched in (True, False))
    assert torch.equal(aligned, raw)


def text_keys(model: torch.nn.Module, x: dict[str, Tensor], patched: bool) -> Tensor:
    """The text keys of the first layer."""
    if not patched:
        moda_attn.remove(model)
    call = calls(model, x)[0]
    return call.key.transpose(1, 2)[call.state.modality == 0]
