"""Recording the attention mass, on patched models and on untouched ones."""

from __future__ import annotations

import pytest
import torch

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.hf import record_mass
from tolerance import assert_close

X = tiny.inputs("llava-llama", ["TTITTT", "TIT", "TTT"])
REAL = X["attention_mask"].bool()


@pytest.mark.parametrize("config", [ModaConfig(), ModaConfig(layers=(1,)), ModaConfig.released()])
def test_masses_of_a_patched_model(config: ModaConfig):
    model = tiny.build()
    moda_attn.apply(model, config)
    tiny.randomise(model)
    implementation = model.model.language_model.config._attn_implementation
    with torch.no_grad():
        expected = model(**X).logits
        with record_mass(model) as recorder:
            recorded = model(**X).logits
        again = model(**X).logits
    assert (recorded - expected)[REAL].abs().max() < 1e-4
    assert torch.equal(again, expected)
    assert model.model.language_model.config._attn_implementation == implementation
    assert sorted(recorder.layers) == [0, 1, 2]
    for layer, entries in recorder.layers.items():
        ((mass, query_modality),) = entries
        modality = torch.where(X["input_ids"] == tiny.IMAGE, 1, 0).masked_fill(~REAL, -1)
        assert torch.equal(query_modality, modality)
        assert mass.shape == (3, 4, X["input_ids"].shape[1], 3)
        total = REAL[:, None].expand(mass.shape[:3]).double()
        assert_close(mass.sum(-1), total, name=f"total mass of layer {layer}")
        pseudo = mass[..., 2].sum()
        assert (pseudo > 0) == (config.mask != "none" and layer in config.layer_indices(3))
        assert (mass[2, :, :, 1] == 0).all()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_untouched_model_is_measured_and_left_as_it_was(family: str, implementation: str):
    """The mass equals the sums of the model's own eager attention weights; nothing of the measurement stays."""
    model = tiny.build(family)
    model.set_attn_implementation({"text_config": implementation})
    x = tiny.inputs(family, ["TTITTT", "TIT"])
    with torch.no_grad():
        before = model(**x).logits
        state = {name: vars(module).keys() for name, module in model.named_modules()}
        classes = [type(module) for module in model.modules()]
        with record_mass(model) as recorder:
            model(**x)
        assert torch.equal(model(**x).logits, before)
    assert [type(module) for module in model.modules()] == classes
    assert {name: vars(module).keys() for name, module in model.named_modules()} == state
    assert model.model.language_model.config._attn_implementation == implementation

    model.set_attn_implementation({"text_config": "eager"})
    positions = (x["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        weights = model(**x, position_ids=positions, output_attentions=True).attentions
    image = x["input_ids"] == tiny.IMAGE
    same = (image[:, :, None] == image[:, None, :])[:, None]
    real = x["attention_mask"].bool()[:, None, :, None]
    for layer, weight in enumerate(weights):
        on_image = (weight * image[:, None, None]).sum(-1)
        expected = torch.stack([weight.sum(-1) - on_image, on_image, weight.sum(-1) * 0], dim=-1)
        (entry,) = recorder.layers[layer]
        assert (entry.mass - expected * real).abs().max() < 1e-5
        expected = torch.stack([(weight * same).sum(-1), (weight * ~same).sum(-1), weight.sum(-1) * 0], dim=-1)
        assert (entry.by_relation - expected * real).abs().max() < 1e-5


def test_generate_makes_one_entry_for_every_forward():
    model = tiny.build()
    moda_attn.apply(model)
    with record_mass(model) as recorder:
        model.generate(**X, max_new_tokens=4, do_sample=False)
    shapes = [tuple(entry.mass.shape[1:3]) for entry in recorder.layers[1]]
    assert shapes == [(4, X["input_ids"].shape[1]), (4, 1), (4, 1), (4, 1)]
    assert all((entry.query_modality == 0).all() for entry in recorder.layers[1][1:])


def test_an_error_inside_the_block_leaves_no_trace():
    model = tiny.build()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(KeyError), record_mass(model):
        raise KeyError
    assert [type(module) for module in model.modules()] == classes
    with record_mass(model) as outer:
        with record_mass(model) as inner:
            model(**X)
        model(**X)
    assert (len(inner.layers[0]), len(outer.layers[0])) == (1, 1)
    assert [type(module) for module in model.modules()] == classes
