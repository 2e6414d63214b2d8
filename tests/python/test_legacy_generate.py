"""The original LLaVA and Cambrian-1 code: decoding of every kind against one forward."""

from __future__ import annotations

import concurrent.futures
import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

import legacy_models
import moda_attn
from legacy_decoding import (
    ALIGN_ONLY,
    PADS,
    ROWS,
    TOLERANCE,
    available,
    difference,
    generate,
    logits,
    one_shot,
    patched,
    step_by_step,
    with_answers,
)
from legacy_models import CODES
from moda_attn import ModaConfig
from moda_attn.hf import record_mass
from moda_attn.hf.legacy import cache as legacy_cache

name = available


@pytest.mark.parametrize(
    "config",
    [ModaConfig(), ALIGN_ONLY, ModaConfig(combine="split", fuser_rank=2), ModaConfig(mask="learned", basis="gram")],
    ids=["default", "align only", "split", "learned"],
)
def test_generation_equals_one_full_forward(name: str, config: ModaConfig):
    model = patched(name, config, pad="left")
    out = generate(model, legacy_models.inputs(name, ROWS, "left"))
    steps = torch.stack(out.scores, dim=1)
    assert difference(steps, one_shot(model, name, ROWS, "left", out.sequences)) < TOLERANCE
    assert difference(steps, step_by_step(model, name, ROWS, "left", out.sequences)) < TOLERANCE
    moda_attn.remove(model)
    assert difference(steps, one_shot(model, name, ROWS, "left", out.sequences)) > 0.1


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [ModaConfig(), ALIGN_ONLY], ids=["default", "align only"])
def test_decoding_by_hand_equals_one_full_forward(name: str, config: ModaConfig, implementation: str, pad: str):
    model = patched(name, config, pad, implementation)
    tokens = torch.randint(2, legacy_models.VOCABULARY, (3, 4))
    steps = step_by_step(model, name, ROWS, pad, tokens)
    assert difference(steps, one_shot(model, name, ROWS, pad, tokens)) < TOLERANCE


def test_forgetting_the_basis_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    """Negative control of the tests above."""
    model = patched(name)
    tokens = torch.randint(2, legacy_models.VOCABULARY, (3, 4))
    keep = legacy_cache.LegacySeam.update

    def forget(self: Any, *args: Any) -> Any:
        result = keep(self, *args)
        state = self.cache.states[args[2]]
        self.cache.states[args[2]] = replace(state, basis=torch.zeros_like(state.basis))
        return result

    monkeypatch.setattr(legacy_cache.LegacySeam, "update", forget)
    steps = step_by_step(model, name, ROWS, "right", tokens)
    assert difference(steps, one_shot(model, name, ROWS, "right", tokens)) > 0.1


def test_rows_are_the_same_alone(name: str):
    """Padding, and what else is in the batch, changes nothing."""
    for pad in PADS:
        model = patched(name, pad=pad)
        x, modality = legacy_models.inputs(name, ROWS, pad), legacy_models.truth(name, ROWS, pad)
        together = logits(model, **x)
        for row in range(len(ROWS)):
            alone = {key: value[row : row + 1] for key, value in x.items() if key != "images"}
            alone["input_ids"] = alone["input_ids"][:, x["attention_mask"][row].bool()]
            del alone["attention_mask"]
            images = x["images"]
            per_tower = isinstance(images, list) and images[0].shape[0] == len(ROWS) and images[0].shape[1] == 3
            per_tower = per_tower and "cambrian" in name
            alone["images"] = [tower[row : row + 1] for tower in images] if per_tower else images[row : row + 1]
            assert difference(logits(model, **alone)[0], together[row, modality[row] >= 0]) < TOLERANCE


@pytest.mark.parametrize("options", [{"num_beams": 3, "length_penalty": 0.0}, {"do_sample": True, "top_k": 0}])
def test_every_beam_and_sample_has_its_own_state(name: str, options: dict[str, Any]):
    if name == "cambrian-sva":
        pytest.skip("Cambrian's SVA updates as many rows as there are images: its own beams differ from single rows")
    model = patched(name, pad="left")
    x = legacy_models.inputs(name, ROWS, "left")
    out = generate(model, x, **({"num_return_sequences": 3} | options))
    for sample in range(3):
        tokens = out.sequences.view(3, 3, -1)[:, sample]
        expected = one_shot(model, name, ROWS, "left", tokens)
        if "num_beams" in options:
            odds = expected.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
            assert difference(out.sequences_scores.view(3, 3)[:, sample], odds) < 1e-4
        else:
            steps = torch.stack(out.scores, dim=1).view(3, 3, tokens.shape[1], -1)[:, sample]
            assert difference(steps, expected) < TOLERANCE


def test_threads_do_not_mix_up_their_prompts(name: str):
    """Both merge before either decodes, to shapes that fit each other's ids."""
    if name == "cambrian-sva":
        pytest.skip("Cambrian's SVA keeps the image features of its last generate on the model")
    model, pause = patched(name), threading.Barrier(2, timeout=300)
    batches = [legacy_models.inputs(name, [row]) for row in ("TITTT", "TTITT" if CODES[name].loose else "TITTT")]
    if not CODES[name].loose:
        batches[1] = {key: value for key, value in batches[1].items() if not key.startswith("image")}
        batches[1]["input_ids"] = torch.randint(2, legacy_models.VOCABULARY, (1, 5))
    alone = [generate(model, x).scores for x in batches]
    waiting = model.model.register_forward_pre_hook(lambda *_: (pause.wait(), None)[1])
    with concurrent.futures.ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(lambda x: generate(model, x).scores, batches))
    waiting.remove()
    for expected, found in zip(alone, together, strict=True):
        assert torch.equal(torch.stack(found), torch.stack(expected))


def test_text_alone(name: str):
    """The original method returns early, or is not called at all."""
    rows = ["TTTT", "TTTTTT"]
    model = patched(name, pad="left")
    x = legacy_models.inputs(name, rows, "left")
    for unwanted in ("images", "image_sizes"):
        x.pop(unwanted, None)
    out = generate(model, x)
    y, modality = with_answers(name, rows, "left", out.sequences)
    y = {key: value for key, value in y.items() if not key.startswith("image")}
    with record_mass(model) as recorder:
        expected = logits(model, **y)[:, -6:-1]
    assert torch.equal(recorder.layers[0][0].query_modality, modality)
    assert difference(torch.stack(out.scores, dim=1), expected) < TOLERANCE


def test_a_later_token_changes_no_earlier_logit(name: str):
    model = patched(name).train()
    tokens = torch.randint(2, legacy_models.VOCABULARY, (1, 5))
    y, modality = with_answers(name, ["TITT"], "right", tokens)
    before = model(**y).logits
    for position in range(5):
        other = copy.deepcopy(y)
        spot = y["input_ids"].shape[1] - 5 + position
        other["input_ids"][0, spot] = (other["input_ids"][0, spot] + 17) % 60 + 2
        after = model(**other).logits
        merged = modality.shape[1] - 5 + position
        assert torch.equal(after[:, :merged], before[:, :merged])
        assert difference(after[:, merged:], before[:, merged:]) > 0.1
