"""Models whose attention is known: uniform, to their own modality alone, to the other alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.analysis import (
    attention_balance,
    balance_over,
    compare,
    generation_balance,
    key_space,
    received_attention,
)
from moda_attn.config import TEXT, VISION

IMAGE_TOKENS, TEXT_TOKENS = 4, 6
#: Of text rows behind the image: keys of each modality that row i sees.
SEEN = np.array([[i + 1, IMAGE_TOKENS] for i in range(TEXT_TOKENS)])


def model_that_looks(at: str) -> nn.Module:
    """Every text token is one vector, every image token another, in all layers; queries find "self", "other", "all"."""
    model = tiny.build()
    core = model.model
    width = core.language_model.config.hidden_size
    axes = torch.eye(width)
    with torch.no_grad():
        core.language_model.embed_tokens.weight.copy_(axes[:1].expand_as(core.language_model.embed_tokens.weight))
        core.multi_modal_projector.linear_2.weight.zero_()
        core.multi_modal_projector.linear_2.bias.copy_(axes[1])
        for layer in core.language_model.layers:
            attention = layer.self_attn
            for part in (attention.o_proj, layer.mlp.down_proj, attention.q_proj, attention.k_proj):
                part.weight.zero_()
            if at == "all":
                continue
            for projection, swapped in ((attention.q_proj, False), (attention.k_proj, at == "other")):
                heads = projection.weight.view(-1, attention.head_dim, width)
                for modality in (TEXT, VISION):
                    # A score of 45, of which the softmax makes 1 and 0.
                    heads[:, (1 - modality) if swapped else modality, modality] = 2.0
    return model


def expected(at: str) -> tuple[np.ndarray, np.ndarray]:
    """(text, vision) mass of a text row and of a vision row, means over rows."""
    text = {"all": (SEEN / SEEN.sum(1, keepdims=True)).mean(0), "self": np.array([1, 0]), "other": np.array([0, 1])}
    return text[at], np.array([0, 1])  # the image comes first and sees no text, whatever it looks for


@pytest.mark.parametrize("at", ["all", "self", "other"])
def test_known_attention_gives_known_numbers(at: str):
    model, x = model_that_looks(at), tiny.inputs("llava-llama", "I" + "T" * TEXT_TOKENS)
    x["position_ids"] = torch.zeros_like(x["input_ids"])  # no rotation
    report = attention_balance(model, **x)
    for modality, masses in zip((TEXT, VISION), expected(at), strict=True):
        rows = report.of(modality)
        assert rows.mass == pytest.approx(np.broadcast_to([*masses, 0], (3, 4, 3)), abs=1e-5)
        own, cross = masses[modality], masses[1 - modality]
        assert rows.self_mass == pytest.approx([own] * 3, abs=1e-5)
        assert rows.cross_mass == pytest.approx([cross] * 3, abs=1e-5)
        assert rows.disparity == pytest.approx(abs(own - cross), abs=1e-5)
        assert rows.relative_disparity == pytest.approx(abs(own - cross), abs=1e-5)
        assert rows.pseudo_share == 0
        if cross > 0:
            assert rows.decay == pytest.approx(1, abs=1e-5)

    received = received_attention(model, **x)
    assert received.images[0][0].grid == (1, 2, 2)
    on_each = expected(at)[0][1] / IMAGE_TOKENS
    assert received.heat_map() == pytest.approx(np.full((3, 2, 2), on_each), abs=1e-5)
    assert received.of(TEXT).sum(-1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_image_receives_is_what_the_balance_says_it_gets(dtype: torch.dtype):
    model, x = tiny.build(dtype=dtype), tiny.inputs("llava-llama", ["TTITTT", "TITT"])
    x["pixel_values"] = x["pixel_values"].to(dtype)
    balance, received = attention_balance(model, **x).of(TEXT), received_attention(model, **x)
    given, rows = received.of(TEXT), [5, 3]
    image = received.modality == VISION
    by_row = np.stack([given[:, row, image[row]].sum(-1) for row in range(2)])
    mean = np.average(by_row, axis=0, weights=rows)
    # The layers of a bfloat16 model round what the next one is given, each measurement its own way.
    assert mean == pytest.approx(balance.cross_mass, abs=1e-5 if dtype == torch.float32 else 0.02)


def test_layers_that_are_not_measured_are_named():
    """Mllama's cross-attention looks at an image alone: in the means it would be a preference of the model."""
    model, x = tiny.build("mllama"), tiny.inputs("mllama", "TTITTT")
    reason = "MllamaTextCrossAttention: cross-attention, whose keys are not the text decoder's own tokens"
    report = attention_balance(model, **x)
    assert (report.layers, report.unmeasured) == ((0, 2, 3), {1: reason})
    assert balance_over(model, [x, x]).grouped_by([0, 1]).unmeasured == {1: reason}
    assert f"not measured: layer 1: {reason}" in str(report)
    assert json.loads(report.to_json())["unmeasured"] == {"1": reason}
    assert f"not measured: layer 1: {reason}" in str(compare(report, report))
    received = received_attention(model, **x)
    answer = generation_balance(model, **x, max_new_tokens=2, do_sample=False)
    assert received.unmeasured == answer.unmeasured == {1: reason}
    moda_attn.apply(model, ModaConfig(layers=(2,)))
    patched = attention_balance(model, **x)
    assert (patched.layers, patched.unmeasured) == ((0, 2, 3), {1: reason})
    assert attention_balance(tiny.build(), **tiny.inputs("llava-llama", "TIT")).unmeasured == {}


@pytest.mark.parametrize("measure", [attention_balance, received_attention, key_space])
def test_measuring_inside_inference_mode_and_between_steps_of_a_generation(measure: Callable):
    """Qwen's model remembers the offset of its last prompt's positions, which the caller's next token needs."""
    model = tiny.build("qwen2-vl")
    with torch.inference_mode():
        model(**tiny.inputs("qwen2-vl", "TTITT"))
        offset = model.model.rope_deltas
        measure(model, **tiny.inputs("qwen2-vl", "TIITTTT"))
    assert offset is not None
    assert model.model.rope_deltas is offset


def test_a_model_in_the_hands_of_peft():
    peft = pytest.importorskip("peft", reason="adapters need peft, which is not installed")
    model, x = tiny.build(), tiny.inputs("llava-llama", ["TTITTT", "TIT"])
    moda_attn.apply(model)
    tiny.randomise(model)
    balance, received, space, answer = measurements(model, x)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["moda"]))
    found = measurements(wrapped, x)
    assert found[0].patched
    assert found[0].of(TEXT).mass == pytest.approx(balance.of(TEXT).mass, abs=1e-6)
    assert found[1].of(TEXT) == pytest.approx(received.of(TEXT), abs=1e-6)
    assert found[2].after.distance == pytest.approx(space.after.distance, abs=1e-6)
    assert (found[2].after.distance != found[2].before.distance)[..., 0, 1].all()
    assert found[3].mass == pytest.approx(answer.mass, abs=1e-5)


def measurements(model: nn.Module, x: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    answer = generation_balance(model, **x, max_new_tokens=3, do_sample=False)
    return attention_balance(model, **x), received_attention(model, **x), key_space(model, **x), answer
