"""Beside accelerate and PEFT. Both are optional: without them these tests are reported as skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moda_attn
import tiny
from moda_attn.errors import ModaValueError
from moda_attn.hf import record_mass

X = tiny.inputs("llava-llama", ["TTITTT", "TIT"])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**X).logits


def patched() -> nn.Module:
    model = tiny.build()
    moda_attn.apply(model)
    tiny.randomise(model)
    return model


def test_a_module_with_accelerates_hook_is_patched_and_restored():
    """The hook stores a forward on the instance, which shadows the class: patching would do nothing, in silence."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = tiny.build()
    plain = logits(model)
    for layer in model.model.language_model.layers:
        hooks.add_hook_to_module(layer.self_attn, hooks.AlignDevicesHook(execution_device=torch.device("cpu")))
    moda_attn.apply(model)
    tiny.randomise(model)
    assert torch.equal(logits(model), logits(patched()))
    assert hasattr(model.model.language_model.layers[0].self_attn, "_hf_hook")
    moda_attn.remove(model)
    assert torch.equal(logits(model), plain)
    assert hasattr(model.model.language_model.layers[0].self_attn, "_hf_hook")


def test_offloaded_parameters_are_fetched_to_compute_and_to_save(tmp_path: Path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = patched()
    expected = logits(model)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    moda_attn.save_pretrained(model, tmp_path)
    fresh = tiny.build()
    moda_attn.load_pretrained(fresh, tmp_path)
    assert torch.equal(logits(fresh), expected)
    with pytest.raises(ModaValueError, match="load the weights first, then offload"):
        moda_attn.load_pretrained(model, tmp_path)
    assert torch.equal(logits(model), expected)


def test_peft_trains_saves_and_reloads_the_parameters(tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny.build()
    moda_attn.apply(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["moda"], r=2)
    )
    own = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert any(".moda." in name for name in own)
    wrapped.train()(**X, labels=X["input_ids"]).loss.backward()
    with torch.no_grad():
        for name, parameter in own.items():
            if "language_model" in name:
                assert parameter.grad is not None, name
            parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.eval()
    with record_mass(wrapped) as recorder:
        logits(wrapped)
    assert sorted(recorder.layers) == [0, 1, 2]
    wrapped.save_pretrained(tmp_path)
    base = tiny.build()
    moda_attn.apply(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again), logits(wrapped))
    with pytest.raises(ModaValueError, match="PEFT"):
        moda_attn.apply(peft.get_peft_model(tiny.build(), peft.LoraConfig(target_modules=["q_proj"])))
