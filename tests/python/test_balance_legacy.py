"""The attention balance of the original LLaVA and Cambrian-1 code, against its own eager attention maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import legacy_models
import moda_attn
from legacy_decoding import ROWS, available, with_answers
from moda_attn import ModaConfig
from moda_attn.analysis import attention_balance, generation_balance, key_space, received_attention
from perturb import randomise

STEPS = 4
name = available


def maps(model: torch.nn.Module, **x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(**x, output_attentions=True, use_cache=False).attentions


@pytest.mark.parametrize("pad", ["left", "right"])
def test_masses_are_those_of_eager_attention(name: str, pad: str):
    model = legacy_models.build(name, "eager", pad)
    x, modality = legacy_models.inputs(name, ROWS, pad), legacy_models.truth(name, ROWS, pad)
    weights = maps(model, **x)
    report, received = attention_balance(model, **x), received_attention(model, **x)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(torch.from_numpy(received.modality), modality)
    for layer, weight in enumerate(weights):
        for balance in report.modalities:
            rows = modality == balance.modality
            on_image = (weight * (modality == 1)[:, None, None]).sum(-1).transpose(1, 2)[rows].mean(0)
            assert torch.from_numpy(balance.mass[layer, :, 1]).sub(on_image).abs().max() < 1e-5
            given = (weight.mean(1) * rows[..., None]).sum(1) / rows.sum(-1, keepdim=True)
            assert torch.from_numpy(received.of(balance.modality)[layer]).sub(given).abs().max() < 1e-5


@pytest.mark.parametrize("config", [None, ModaConfig()], ids=["unpatched", "patched"])
def test_a_generation_is_that_of_one_forward(name: str, config: ModaConfig | None):
    model = legacy_models.build(name, "eager", "left")
    if config is not None:
        moda_attn.apply(model, config)
        randomise(model)
    # After its first generation Cambrian computes its forward another way.
    for _ in range(2):
        found = generation_balance(
            model, **legacy_models.inputs(name, ROWS, "left"), max_new_tokens=STEPS, do_sample=False
        )
    y, modality = with_answers(name, ROWS, "left", torch.from_numpy(found.tokens))
    new = (torch.arange(modality.shape[1]) >= modality.shape[1] - STEPS).expand_as(modality)
    groups = torch.stack([(modality == 0) & ~new, (modality == 1) & ~new, new], dim=-1).float()
    for layer, weight in enumerate(maps(model, **y)):
        expected = (weight @ groups[:, None]).mean(1)[:, -STEPS - 1 : -1]
        masses = torch.from_numpy(found.mass[layer][..., [0, 1, 2]])
        assert (masses - expected).abs().max() < 1e-4


def test_the_key_space_before_and_after(name: str):
    model = legacy_models.build(name)
    x = legacy_models.inputs(name, ROWS)
    assert key_space(model, **x).after is None
    moda_attn.apply(model)
    randomise(model)
    space = key_space(model, **x)
    assert space.after is not None
    assert (space.before.distance[..., 0, 1] != space.after.distance[..., 0, 1]).all()
