"""The original LLaVA and Cambrian-1 code: training, PEFT, saved and released weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legacy_models
import moda_attn
from legacy_decoding import (
    ALIGN_ONLY,
    ROWS,
    available,
    difference,
    logits,
    patched,
    with_answers,
)
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError, ModaValueError

name = available


def gradients(model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    model.zero_grad()
    sum(model(**batch).loss for batch in batches).backward()
    return {path: parameter.grad.clone() for path, parameter in model.named_parameters() if ".moda." in path}


@pytest.mark.parametrize("config", [ModaConfig(), ALIGN_ONLY], ids=["default", "align only"])
def test_training_with_checkpointing_has_the_same_gradients(name: str, config: ModaConfig):
    """Also of two forwards before one backward: each recomputes its layers with its own ids."""
    model = patched(name, config).train()
    batches = [
        with_answers(name, rows, "right", torch.randint(2, legacy_models.VOCABULARY, (2, 3)))[0]
        for rows in (["TITT", "TITTTTT"], ["TIT", "TITT"])
    ]
    expected = gradients(model, batches)
    assert len(expected) > 0
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.get_input_embeddings().weight.requires_grad_()
        found = gradients(model, batches)
        assert all(torch.equal(found[path], expected[path]) for path in expected)
    with pytest.raises(ModaValueError, match="where the prompt ends"):
        model(**{key: value for key, value in batches[0].items() if key != "labels"})


def test_peft_trains_and_saves_moda_or_says_so(name: str, tmp_path: Any):
    peft = pytest.importorskip(
        "peft", reason="peft is not installed, or needs a newer transformers", exc_type=ImportError
    )
    batch = with_answers(name, ROWS, "right", torch.randint(2, legacy_models.VOCABULARY, (3, 3)))[0]
    model = patched(name).train()
    expected = model(**batch).loss
    queries = r".*\.layers\.\d+\.self_attn\.q_proj"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=queries, modules_to_save=["moda"]))
    loss = wrapped(**batch).loss
    assert torch.equal(loss, expected)
    loss.backward()
    trained = {path: parameter for path, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert sum("lora_" in path for path in trained) == 2 * 3
    assert all(parameter.grad is not None for parameter in trained.values())
    moda_attn.save_pretrained(wrapped, tmp_path)
    twin = legacy_models.build(name)
    moda_attn.load_pretrained(twin, tmp_path)
    assert torch.equal(logits(twin, **batch), logits(wrapped.eval(), **batch))
    lost = peft.get_peft_model(patched(name).train(), peft.LoraConfig(target_modules=queries))
    with pytest.raises(ModaRuntimeError, match="PEFT neither trains nor saves"):
        lost(**batch)


def test_weights_are_saved_by_layer_index(name: str, tmp_path: Any):
    model = patched(name)
    x = legacy_models.inputs(name, ROWS)
    expected = logits(model, **x)
    moda_attn.save_pretrained(model, tmp_path)
    twin = legacy_models.build(name)
    moda_attn.load_pretrained(twin, tmp_path)
    assert torch.equal(logits(twin, **x), expected)


def test_released_weights_are_loaded(name: str):
    """Their names are those of this code: `model.layers.i.self_attn.ratio_v`, and so on."""
    model, x = legacy_models.build(name), legacy_models.inputs(name, ROWS)
    real = legacy_models.truth(name, ROWS) >= 0
    plain, state = logits(model, **x)[real], {}
    for index in range(3):
        stem = f"model.layers.{index}.self_attn."
        state |= {stem + "ratio_v": torch.zeros(1, 1, 8), stem + "pfuser_v.weight": torch.eye(8)}
    assert moda_attn.load_released(model, state).layers == (0, 1, 2)
    assert torch.equal(logits(model, **x)[real], plain)
    for index in range(3):
        state[f"model.layers.{index}.self_attn.ratio_v"] = torch.randn(1, 1, 8)
    moda_attn.load_released(model, state)
    assert difference(logits(model, **x)[real], plain) > 0.1
