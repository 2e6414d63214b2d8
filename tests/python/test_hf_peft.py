"""Beside PEFT: LoRA on the base model, MODA's parameters in ``modules_to_save``. Skipped where PEFT is missing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError, ModaValueError
from moda_attn.hf import record_mass

peft = pytest.importorskip("peft", reason="PEFT is not installed")

X = tiny.inputs("llava-llama", ["TTITTT", "TIT"])
LABELLED = X | {"labels": X["input_ids"].masked_fill(torch.arange(X["input_ids"].shape[1]) < 6, -100)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**X).logits


def lora(**changes) -> peft.LoraConfig:
    settings = {"target_modules": r".*language_model.*\.[qv]_proj", "modules_to_save": ["moda"], "r": 2}
    return peft.LoraConfig(**settings | changes)


def wrapped(config: ModaConfig | None = None, **changes) -> nn.Module:
    model = tiny.build()
    moda_attn.apply(model, config)
    tiny.randomise(model)
    return peft.get_peft_model(model, lora(**changes))


def trained() -> nn.Module:
    """After a few steps, so that the adapter and its copy of MODA's parameters have moved."""
    model = wrapped().train()
    steps(model, 3)
    return model.eval()


def steps(model: nn.Module, count: int) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(count):
        loss = model(**LABELLED).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_every_trainable_parameter_gets_a_gradient(checkpointing: bool | None):
    model = wrapped().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model(**LABELLED).loss.backward()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = [".moda." in name for name in own]
    assert any(kinds)
    assert not all(kinds)
    for name, parameter in own.items():
        assert parameter.grad is not None, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_trained_adapter_is_reloaded_and_trained_on(tmp_path: Path):
    model = trained()
    model.save_pretrained(tmp_path)
    moda_attn.save_pretrained(model, tmp_path)  # beside it, for the configuration
    base = tiny.build()
    moda_attn.load_pretrained(base, tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again), logits(model))
    assert steps(again.train(), 3) == steps(model.train(), 3)


def test_a_merged_adapter_leaves_a_patched_model(tmp_path: Path):
    model = trained()
    expected = logits(model)
    generated = model.generate(**X, max_new_tokens=3, do_sample=False)
    moda_attn.save_pretrained(model, tmp_path)  # what was trained, not the parameters from before
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().max() < 1e-4
    assert torch.equal(merged.generate(**X, max_new_tokens=3, do_sample=False), generated)
    moda_attn.save_pretrained(merged, tmp_path / "merged")
    for folder in (tmp_path, tmp_path / "merged"):
        moda_attn.remove(merged)
        moda_attn.load_pretrained(merged, folder)
        assert (logits(merged) - expected).abs().max() < 1e-4


def test_without_the_adapter_the_parameters_are_those_from_before():
    model = trained()
    before = tiny.build()
    moda_attn.apply(before)
    tiny.randomise(before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(before))
    assert not torch.equal(logits(model), logits(before))


def test_every_layer_of_a_wrapped_model_is_recorded():
    model = wrapped()
    with record_mass(model) as recorder:
        logits(model)
    assert sorted(recorder.layers) == [0, 1, 2]


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_parameters_that_peft_does_not_save_are_not_trained_in_silence(how: str):
    if how == "get_peft_model":
        model = wrapped(modules_to_save=None)
    else:
        model = tiny.build()
        moda_attn.apply(model)
        model.add_adapter(lora(modules_to_save=None))
    logits(model)
    with pytest.raises(ModaRuntimeError, match=r'modules_to_save=\["moda"\] in the adapter'):
        model.train()(**LABELLED)


def reloaded(model: nn.Module, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A model whose adapter, by transformers' own methods, was trained and saved, and another one that loaded it."""
    again = copy.deepcopy(model)
    module = "moda" if any(".moda." in name for name in model.state_dict()) else "lm_head"
    model.add_adapter(lora(modules_to_save=[module]))
    steps(model.train(), 2)
    model.eval().save_pretrained(folder)
    again.load_adapter(str(folder))
    return model, again.eval()


def test_the_adapter_of_transformers_itself(tmp_path: Path):
    # Some releases restore no modules_to_save at all, of no model.
    plain, again = reloaded(tiny.build(), tmp_path / "plain")
    if not torch.equal(logits(plain), logits(again)):
        pytest.skip("load_adapter of this release of transformers loses modules_to_save, without MODA too")
    model = tiny.build()
    moda_attn.apply(model)
    tiny.randomise(model)
    model, again = reloaded(model, tmp_path / "moda")
    assert torch.equal(logits(again), logits(model))


def test_linear_layers_inside_moda_are_saved_not_adapted():
    """`all-linear` means those of the ablation networks too; they are trained whole already."""
    model = wrapped(ModaConfig(aligner="mlp2"), target_modules="all-linear")
    assert not any(".moda." in name and "lora" in name for name, _ in model.named_parameters())
    assert any("language_model" in name and "lora" in name for name, _ in model.named_parameters())


def test_what_is_refused(tmp_path: Path):
    late = peft.get_peft_model(tiny.build(), lora(modules_to_save=None))
    for model in (late, late.get_base_model()):
        with pytest.raises(ModaValueError, match=r'wrapped by PEFT.*modules_to_save=\["moda"\]'):
            moda_attn.apply(model)
    with pytest.raises(ModaValueError, match="is not patched; nothing to save"):
        moda_attn.save_pretrained(late, tmp_path)
    model = wrapped()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModaValueError, match=r"holds no moda_config.json; it is an adapter of PEFT"):
        moda_attn.load_pretrained(tiny.build(), tmp_path / "adapter")
    with pytest.raises(ModaValueError, match="merge or unload its adapter first"):
        moda_attn.remove(model.get_base_model())
    moda_attn.remove(model.unload())
