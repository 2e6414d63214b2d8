"""Beside other patches: those that would hide MODA, or that MODA would hide, raise; the others work as before."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError, ModaValueError

X = tiny.inputs("llava-llama", ["TTITTT", "TIT"])
ALIGN_ONLY = ModaConfig(mask="none", location_prior=False)
LlamaAttention = modeling_llama.LlamaAttention


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**X).logits


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.language_model.layers]


def own_attention(update: bool) -> Callable:
    """A faster forward as another library would write it; `update`: whether it hands its keys to the cache."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if update:
            key, value = past_key_values.update(key, value, self.layer_idx)
        result = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(result.transpose(1, 2).flatten(2)), None

    return forward


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_forward_of_another_patch_is_refused_and_nothing_is_changed(where: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny.build()
    if where == "class":
        monkeypatch.setattr(LlamaAttention, "forward", own_attention(update=True))
    else:  # on the last layer, as a bound method
        foreign = attentions(model)[-1]
        foreign.forward = types.MethodType(own_attention(update=True), foreign)
    with pytest.raises(ModaValueError, match=r"LlamaAttention has a forward .*another patch, such as Unsloth's"):
        moda_attn.apply(model)
    assert {type(module) for module in attentions(model)} == {LlamaAttention}
    assert not any(".moda." in name for name in model.state_dict())
    assert model.model.language_model.config._attn_implementation == "sdpa"
    with pytest.raises(ModaValueError, match="not patched"):
        moda_attn.remove(model)


def test_a_class_patched_later_that_keeps_its_keys_to_itself(monkeypatch: pytest.MonkeyPatch):
    for config in (ALIGN_ONLY, ModaConfig()):
        model = tiny.build()
        moda_attn.apply(model, config)
        with monkeypatch.context() as patch:
            patch.setattr(LlamaAttention, "forward", own_attention(update=False))
            with pytest.raises(ModaRuntimeError, match="never updated its cache: another patch replaced it"):
                logits(model)
        logits(model)


def test_a_class_patched_later_that_attends_by_itself(monkeypatch: pytest.MonkeyPatch):
    """Its keys are aligned, which is all that some configurations ask for; a modular mask would be lost."""
    model = tiny.build()
    moda_attn.apply(model)
    monkeypatch.setattr(LlamaAttention, "forward", own_attention(update=True))
    with pytest.raises(ModaRuntimeError, match='did not call the attention function "moda"'):
        logits(model)
    moda_attn.remove(model)

    monkeypatch.undo()
    moda_attn.apply(model, ALIGN_ONLY)
    tiny.randomise(model)
    x = {name: tensor[:1] for name, tensor in X.items()}  # it knows no padding
    with torch.no_grad():
        expected = model(**x).logits
        monkeypatch.setattr(LlamaAttention, "forward", own_attention(update=True))
        assert (model(**x).logits - expected).abs().max() < 1e-4


def test_patches_of_other_parts_stay_and_have_their_effect(monkeypatch: pytest.MonkeyPatch):
    """What Liger-Kernel replaces: rotary embedding, norms, MLPs, and the model's forward on the instance."""
    calls: set[str] = set()

    def noted(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            calls.add(name)
            return function(*args, **kwargs)

        return wrapper

    rotary, mlp = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", noted("rotary", rotary))
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", noted("mlp", mlp))
    model = tiny.build()
    for module in (model, model.model, attentions(model)[0].q_proj, model.model.language_model.norm):
        module.forward = types.MethodType(noted(type(module).__name__, type(module).forward), module)
    moda_attn.apply(model)
    tiny.randomise(model)

    changed = logits(model)
    assert calls == {"rotary", "mlp", "LlavaForConditionalGeneration", "LlavaModel", "Linear", "LlamaRMSNorm"}
    monkeypatch.undo()
    expected = tiny.build()
    moda_attn.apply(expected)
    tiny.randomise(expected)
    assert torch.equal(changed, logits(expected))
    model.generate(**X, max_new_tokens=2, do_sample=False)
    moda_attn.remove(model)
    assert torch.equal(logits(model), logits(tiny.build()))
