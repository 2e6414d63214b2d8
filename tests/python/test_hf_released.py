"""Loading weights under the names of the authors' released code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.errors import ModaTypeError, ModaValueError
from moda_attn.hf.patch import moda_layers, runtime_of
from moda_attn.layer import attend
from tolerance import relative_l2

GOLDEN = Path(__file__).parent.parent / "golden"
X = tiny.inputs("llava-llama", ["TTITTT", "TIT"])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**X).logits


def released_layer(gate: Tensor, fuser: Tensor) -> dict[str, Tensor]:
    """What the released code stores for one attention module beside its projections."""
    dim = fuser.shape[0]
    unused = {
        "ratio_t": torch.randn(1, 1, dim),
        "pfuser_t.weight": torch.randn(dim, dim),
        "pnorm.weight": torch.ones(dim),
    }
    return {"ratio_v": gate.reshape(1, 1, dim), "pfuser_v.weight": fuser, **unused}


def checkpoint(layers: int = 3, dim: int = 8, prefix: str = "model.") -> dict[str, Tensor]:
    """A whole checkpoint: MODA's tensors among those of the base model."""
    state = {f"{prefix}embed_tokens.weight": torch.randn(4, 4), f"{prefix}norm.weight": torch.ones(4)}
    for index in range(layers):
        stem = f"{prefix}layers.{index}.self_attn."
        state |= {stem + name: t for name, t in released_layer(torch.randn(dim), torch.randn(dim, dim)).items()}
        state |= {f"{stem}{part}_proj.weight": torch.randn(4, 4) for part in "qkvo"}
    return state


@pytest.mark.parametrize("stem", ["img_middle.gqa_d16.sdpa", "img_last.gqa_d16.sdpa"])
def test_a_loaded_layer_reproduces_the_released_one(stem: str):
    """Through the whole way in: state dict, patched model, layer; against tensors recorded from the released code."""
    case = json.loads((GOLDEN / "layer_cases.json").read_text())["cases"][f"{stem}.float64"]
    with safe_open(GOLDEN / case["file"], framework="pt") as file:
        golden = {name: file.get_tensor(f"{stem}/{name}") for name in case["shapes"]}
    sizes = {"hidden_size": 16 * case["H"], "num_attention_heads": case["H"], "num_key_value_heads": case["Hkv"]}
    text = LlamaConfig(**sizes, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=7)
    ).double()
    tensors = released_layer(golden["ratio_v"], golden["pfuser_v"])
    moda_attn.load_released(model, {f"model.layers.0.self_attn.{name}": tensor for name, tensor in tensors.items()})

    layer = moda_layers(model)[0]
    modality = torch.where(golden["vflag"], 1, torch.where(golden["tflag"], 0, -1))
    with torch.no_grad():
        aligned, state = layer(golden["k"], golden["v"], modality, context=None, state=None)
        out, _ = attend(layer, golden["q"], aligned, golden["v"], state, scale=16**-0.5)
    real = golden["attention_mask"][:, None, :, None]
    assert relative_l2(out * real, golden["out"] * real) <= 1e-12


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", "model.language_model."])
def test_where_each_tensor_goes(prefix: str):
    model = tiny.build()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.bfloat16() for name, tensor in checkpoint(prefix=prefix).items()}
    report = moda_attn.load_released(model, state)
    assert (report.layers, report.already, report.parameters) == ((0, 1, 2), False, 3 * (8 + 64))
    for index, layer in moda_layers(model).items():
        stem = f"{prefix}layers.{index}.self_attn."
        assert torch.equal(layer.aligner.fuser.gate, state[stem + "ratio_v"].float()[0])
        assert torch.equal(layer.aligner.fuser.weight[0], state[stem + "pfuser_v.weight"].float().T)
    # The base model's tensors in the checkpoint are left alone: it is loaded by its own means.
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())


def test_a_model_that_is_patched_already():
    plain, released = tiny.build(), ModaConfig.released()
    state = checkpoint()
    moda_attn.load_released(plain, state)
    expected = logits(plain)
    for config in (released, dataclasses.replace(released, context="prompt")):
        model = tiny.build()
        moda_attn.apply(model, config)
        assert moda_attn.load_released(model, state).already
        assert torch.equal(logits(model), expected)  # one call, no labels: both contexts are all tokens
    masked = tiny.build()
    moda_attn.apply(masked, dataclasses.replace(released, mask="decay"))
    moda_attn.load_released(masked, state)
    assert (logits(masked) - expected).abs().max() > 1e-3
    other = tiny.build()
    moda_attn.apply(other)
    with pytest.raises(ModaValueError, match=r"patched with align_ids = \(0, 1\); the released alignment has \(1,\)"):
        moda_attn.load_released(other, state)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


FIRST = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without(checkpoint(), FIRST + "ratio_v"), r"missing layers\.0\.self_attn\.ratio_v$"),
        (checkpoint(2), r"missing layers\.2\.self_attn\.ratio_v; missing layers\.2\.self_attn\.pfuser_v\.weight$"),
        (checkpoint(4), "unexpected layer 3$"),
        (checkpoint(dim=4), r"layers\.0\.self_attn\.ratio_v is \(1, 1, 4\), wanted \(1, 1, 8\)"),
        (checkpoint() | {FIRST + "pfuser_v.bias": torch.zeros(8)}, r"unknown .*pfuser_v\.bias$"),
        (checkpoint() | {FIRST + "ratio_x": torch.zeros(8)}, r"unknown .*ratio_x$"),
        (checkpoint() | {"model.mm_projector.pfuser_v.weight": torch.zeros(8)}, r"unknown .*mm_projector"),
        (checkpoint() | {"layers.0.self_attn.ratio_v": torch.zeros(1, 1, 8)}, "second tensor for layer 0"),
        (without(checkpoint(0), ""), r"missing layers\.0\.self_attn\.ratio_v; missing"),
    ],
)
def test_names_and_shapes_that_do_not_fit(state: dict[str, Tensor], message: str):
    model = tiny.build()
    plain = logits(model)
    with pytest.raises(ModaValueError, match=message):
        moda_attn.load_released(model, state)
    assert runtime_of(model) is None
    assert torch.equal(logits(model), plain)


def test_what_is_no_state_dict():
    with pytest.raises(ModaTypeError, match="state_dict must be a mapping of names to tensors, got str"):
        moda_attn.load_released(tiny.build(), "checkpoint.bin")
    with pytest.raises(ModaTypeError, match=r"ratio_v must be a torch\.Tensor, got list"):
        moda_attn.load_released(tiny.build(), {FIRST + "ratio_v": [0.0]})
