"""The original LLaVA and Cambrian-1 code: patched it starts as it was, and is undone; what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import legacy_models
import moda_attn
from legacy_decoding import (
    ALIGN_ONLY,
    MISSING,
    PADS,
    ROWS,
    TOLERANCE,
    available,
    difference,
    generate,
    logits,
    patched,
    with_answers,
)
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError, ModaValueError
from moda_attn.hf import record_mass
from perturb import randomise

name = available


@pytest.mark.parametrize("name", MISSING)
def test_code_that_is_not_covered_here(name: str):
    pytest.skip(MISSING[name])


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_alignment_starts_as_the_identity_exactly(name: str, implementation: str, pad: str):
    model = legacy_models.build(name, implementation, pad)
    x = legacy_models.inputs(name, ROWS, pad)
    modality = legacy_models.truth(name, ROWS, pad)
    # The patch counts positions without padding; the original code does if it is given any, whatever they say.
    plain = logits(model, **x, position_ids=torch.zeros_like(x["input_ids"]))
    report = moda_attn.apply(model, ALIGN_ONLY)
    assert (report.layers, report.attention) == ((0, 1, 2), implementation)
    assert torch.equal(logits(model, **x)[modality >= 0], plain[modality >= 0])
    moda_attn.remove(model)
    moda_attn.apply(model, ALIGN_ONLY, attention="moda")
    assert difference(logits(model, **x)[modality >= 0], plain[modality >= 0]) < 1e-4
    randomise(model)
    assert difference(logits(model, **x)[modality >= 0], plain[modality >= 0]) > 0.1


def test_the_kernel_stands_in_for_flash_attention(name: str):
    """Which cannot run here, and is given another mask: the kernel reads neither."""
    expected = logits(patched(name), **legacy_models.inputs(name, ROWS))
    model = legacy_models.build(name)
    model.model._use_flash_attention_2 = True
    for layer in model.model.layers:
        names = legacy_models.namespace(layer.self_attn)
        layer.self_attn.__class__ = next(names[name] for name in names if name.endswith("FlashAttention2"))
    moda_attn.apply(model)
    randomise(model)
    assert torch.equal(logits(model, **legacy_models.inputs(name, ROWS)), expected)


@pytest.mark.parametrize("config", [ModaConfig(), ALIGN_ONLY], ids=["default", "align only"])
def test_remove_restores_everything(name: str, config: ModaConfig):
    model = legacy_models.build(name)
    x = legacy_models.inputs(name, ROWS)
    generate(model, x)  # after this, a Cambrian model with SVA computes its forward another way, patched or not
    plain = logits(model, **x)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    moda_attn.apply(model, config)
    assert moda_attn.apply(model, config).already
    randomise(model)
    assert not torch.equal(logits(model, **x), plain)
    generate(model, x)
    moda_attn.remove(model)
    assert torch.equal(logits(model, **x), plain)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert model.config._attn_implementation == "sdpa"


def test_a_deep_copy_is_independent(name: str):
    model = patched(name)
    x = legacy_models.inputs(name, ROWS)
    expected = logits(model, **x)
    twin = copy.deepcopy(model)
    moda_attn.remove(model)
    assert torch.equal(logits(twin, **x), expected)
    assert generate(twin, x).sequences.shape == (3, 5)


def test_an_unpatched_model_is_watched_and_left_alone(name: str):
    model = legacy_models.build(name)
    x = legacy_models.inputs(name, ROWS)
    plain = logits(model, **x)
    tokens = torch.randint(2, legacy_models.VOCABULARY, (3, 4))
    y, modality = with_answers(name, ROWS, "right", tokens)
    report = moda_attn.attention_balance(model, **y)
    assert sum(part.rows for part in report.answers) == 3 * 4
    assert torch.equal(logits(model, **x), plain)
    with record_mass(model) as recorder:
        logits(model, **y)
    labels = recorder.labels
    assert labels.shape == modality.shape
    assert torch.equal(labels[labels >= 0].view(3, 4), tokens)


def test_offloaded_layers_are_fetched(name: str):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = patched(name)
    expected = logits(model, **legacy_models.inputs(name, ROWS))
    for layer in model.model.layers:
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for path, parameter in model.named_parameters() if ".moda." in path)
    assert torch.equal(logits(model, **legacy_models.inputs(name, ROWS)), expected)


def test_bfloat16(name: str):
    model = patched(name).to(torch.bfloat16)
    for tower in getattr(model.model, "vision_tower_aux_list", ()):  # which Cambrian keeps out of the model's modules
        tower.to(torch.bfloat16)
    x = legacy_models.inputs(name, ROWS)
    images = x["images"]
    x["images"] = [image.bfloat16() for image in images] if isinstance(images, list) else images.bfloat16()
    real = legacy_models.truth(name, ROWS) >= 0
    expected = logits(patched(name), **legacy_models.inputs(name, ROWS))[real]
    assert ((logits(model, **x)[real] - expected).norm() / expected.norm()) < 0.1


def test_what_is_refused(name: str):
    model = patched(name)
    x = legacy_models.inputs(name, ROWS)
    token = torch.full((3, 1), 5)
    with torch.no_grad():
        cache = legacy_models.build(name)(**x, use_cache=True).past_key_values
        with pytest.raises(ModaRuntimeError, match="that this patched model did not fill"):
            model(input_ids=token, past_key_values=cache)
        with pytest.raises(ModaValueError, match="which tokens are image is unknown"):
            model(inputs_embeds=torch.zeros(3, 4, 32))
        cache = model(**x, use_cache=True).past_key_values
        with pytest.raises(ModaValueError, match="images in a call on a cache of"):
            model(**(x | {"attention_mask": None}), past_key_values=cache)
        with pytest.raises(ModaRuntimeError, match="call the model, not its layers"):
            model.model.layers[0].self_attn(torch.zeros(1, 1, 32))
        model.config.sliding_window = 8
        with pytest.raises(ModaValueError, match="tokens exceed the sliding window of 8"):
            model(**x)
        model.config.sliding_window = None
        model.config._attn_implementation = "sdpa"
        with pytest.raises(ModaRuntimeError, match="after the patch"):
            model(**x)
    hidden = patched(name)
    attention = hidden.model.layers[1].self_attn
    attention.forward = lambda hidden_states, past_key_value, **_: (hidden_states, None, past_key_value)
    with pytest.raises(ModaRuntimeError, match=r"layers \[1\] were not entered"):
        logits(hidden, **x, use_cache=False)


def test_attention_weights_are_those_of_the_eager_implementation(name: str):
    x, real = legacy_models.inputs(name, ROWS), legacy_models.truth(name, ROWS) >= 0
    weights = []
    for attention in ("keep", "moda"):
        model = legacy_models.build(name, "eager")
        moda_attn.apply(model, ALIGN_ONLY, attention=attention)
        randomise(model)
        with torch.no_grad():
            weights.append(torch.stack(model(**x, output_attentions=True).attentions))
    rows = real[None, :, None, :, None].expand(weights[0].shape)
    assert difference(weights[0][rows], weights[1][rows]) < TOLERANCE
    assert weights[0][rows].std() > 0.01


def test_models_of_another_make_are_named():
    model = legacy_models.build("llava-standin")
    model.model.layers[1].self_attn = nn.Linear(2, 2)
    with pytest.raises(ModaValueError, match="text attention Linear; wanted LlamaAttention or MistralAttention"):
        moda_attn.apply(model)
    model = legacy_models.build("llava-standin")
    del model.model.layers[0].self_attn.rotary_emb
    with pytest.raises(ModaValueError, match="lacks part rotary_emb"):
        moda_attn.apply(model)
    model = legacy_models.build("llava-standin")
    model.prepare_inputs_labels_for_multimodal = lambda *_: None
    with pytest.raises(ModaValueError, match="another patch's"):
        moda_attn.apply(model)
