"""Beside accelerate: its hooks, weights it keeps elsewhere, and models it prepares. Skipped where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moda_attn
import tiny
from moda_attn.errors import ModaValueError

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate import hooks  # noqa: E402

X = tiny.inputs("llava-llama", ["TTITTT", "TIT"])
CPU = torch.device("cpu")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**X).logits


def patched(model: nn.Module | None = None) -> nn.Module:
    model = tiny.build() if model is None else model
    moda_attn.apply(model)
    tiny.randomise(model)
    return model


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.language_model.layers]


def disk_map(model: nn.Module) -> dict[str, str]:
    """The first layer stays, the others go to the disk."""
    places = {f"model.language_model.layers.{index}": "disk" for index in range(1, len(attentions(model)))}
    for name in ("embed_tokens", "layers.0", "norm", "rotary_emb"):
        places[f"model.language_model.{name}"] = "cpu"
    return places | {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("append", [False, True], ids=["one hook", "a sequence of hooks"])
def test_a_module_with_a_hook_is_patched_and_restored(append: bool):
    """The hook stores a forward on the instance, which shadows the class: patching would do nothing, in silence."""
    model = tiny.build()
    plain = logits(model)
    for module in attentions(model):
        for _ in range(1 + append):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device=CPU), append=append)
    kept = [module._hf_hook for module in attentions(model)]
    patched(model)
    assert torch.equal(logits(model), logits(patched()))
    assert [module._hf_hook for module in attentions(model)] == kept
    moda_attn.remove(model)
    assert torch.equal(logits(model), plain)
    assert [module._hf_hook for module in attentions(model)] == kept


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_parameters_are_fetched_to_compute_and_to_save(where: str, tmp_path: Path):
    """Hooks fetch them when a submodule is called: a plain method of it would find them on the meta device."""
    model = patched()
    expected = logits(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=CPU)
    else:
        accelerate.disk_offload(model, str(tmp_path / "disk"), execution_device=CPU)
    assert all(p.is_meta for name, p in model.named_parameters() if ".moda." in name)
    assert torch.equal(logits(model), expected)
    moda_attn.save_pretrained(model, tmp_path)
    fresh = tiny.build()
    moda_attn.load_pretrained(fresh, tmp_path)
    assert torch.equal(logits(fresh), expected)
    with pytest.raises(ModaValueError, match="load the weights first, then offload"):
        moda_attn.load_pretrained(model, tmp_path)
    assert torch.equal(logits(model), expected)
    moda_attn.remove(model)
    assert torch.equal(logits(model), logits(tiny.build()))


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model", "from_pretrained"])
def test_a_model_that_is_offloaded_already(how: str, tmp_path: Path):
    """The new parameters stay where the model computes; they are as small as the weights around them are large."""
    expected = patched()
    moda_attn.save_pretrained(expected, tmp_path / "moda")
    model = tiny.build()
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=CPU)
    elif how == "dispatch_model":
        accelerate.dispatch_model(model, disk_map(model), main_device="cpu", offload_dir=str(tmp_path / "disk"))
    else:
        model.save_pretrained(tmp_path / "base")
        places = {"device_map": disk_map(model), "offload_folder": str(tmp_path / "disk")}
        model = type(model).from_pretrained(tmp_path / "base", **places).eval()
    assert attentions(model)[1].k_proj.weight.is_meta
    moda_attn.load_pretrained(model, tmp_path / "moda")
    own = [p for name, p in model.named_parameters() if ".moda." in name]
    assert {p.device for p in own} == {CPU}
    assert torch.equal(logits(model), logits(expected))
    moda_attn.remove(model)
    assert torch.equal(logits(model), logits(tiny.build()))


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_trains_and_can_be_unwrapped(precision: str):
    """With mixed precision `prepare` puts a forward of its own on the model."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model, x = patched().train(), tiny.labelled("llava-llama", ["TTITTT", "TITTT"])
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if ".moda." in name], lr=0.1)
    ready, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        loss = ready(**x).loss
        accelerator.backward(loss)
        assert all(p.grad is not None for name, p in model.named_parameters() if ".moda." in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    plain = accelerator.unwrap_model(ready, keep_fp32_wrapper=False).eval()
    moda_attn.remove(plain)
    assert torch.equal(logits(plain), logits(tiny.build()))


@pytest.mark.usefixtures("fresh_accelerator")
def test_positional_arguments_keep_their_meaning_behind_a_wrapped_forward():
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = patched()
    ready = accelerator.prepare(model)
    with torch.no_grad():
        by_name = ready(**X).logits
        by_place = ready(X["input_ids"], X["pixel_values"], X["attention_mask"]).logits
    assert torch.equal(by_name, by_place)
