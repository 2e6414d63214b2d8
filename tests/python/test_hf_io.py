"""Saving and loading the MODA part of a patched model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.errors import ModaValueError

CONFIGS = [
    ModaConfig(),
    ModaConfig.released(),
    ModaConfig(layers=(0, 2), combine="split", mask="learned", fuser_rank=2),
    ModaConfig(aligner="mlp2_gelu", mask="fixed"),
]


def trained(config: ModaConfig, family: str = "llava-llama") -> nn.Module:
    model = tiny.build(family)
    moda_attn.apply(model, config)
    tiny.randomise(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs("llava-llama", ["TTITTT", "TIT"])).logits


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_round_trip(config: ModaConfig, tmp_path: Path):
    model = trained(config)
    moda_attn.save_pretrained(model, tmp_path / "new" / "folder")
    fresh = tiny.build()
    report = moda_attn.load_pretrained(fresh, tmp_path / "new" / "folder")
    assert report.layers == config.layer_indices(3)
    assert torch.equal(logits(fresh), logits(model))
    # Loading into a model that is patched already replaces its weights.
    tiny.randomise(fresh, scale=1.0)
    assert moda_attn.load_pretrained(fresh, tmp_path / "new" / "folder").already
    assert torch.equal(logits(fresh), logits(model))


def test_what_is_written(tmp_path: Path):
    moda_attn.save_pretrained(trained(ModaConfig(layers=(1,))), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"moda_config.json", "moda_model.safetensors"}
    record = json.loads((tmp_path / "moda_config.json").read_text())
    assert ModaConfig.from_dict(record["config"]) == ModaConfig(layers=(1,))
    assert record["shape"] == {"layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    assert (record["format"], record["model"]) == (1, "LlavaForConditionalGeneration")
    assert record["version"] == moda_attn.__version__
    weights = load_file(tmp_path / "moda_model.safetensors")
    names = {"aligner.fuser.keep", "aligner.fuser.mix", "mask.base", "mask.decay", "prior.strength"}
    assert set(weights) == {f"layers.1.{name}" for name in names}


def test_weights_go_from_one_family_to_another_of_the_same_sizes(tmp_path: Path):
    """Keys are layer indices: nothing depends on how transformers names the modules around them."""
    moda_attn.save_pretrained(trained(ModaConfig(), "llava-next-mistral"), tmp_path)
    model = tiny.build("llava-llama")
    moda_attn.load_pretrained(model, tmp_path)
    assert torch.equal(logits(model), logits(trained(ModaConfig())))


def test_the_base_model_keeps_its_own_save_pretrained(tmp_path: Path):
    model = trained(ModaConfig())
    expected = logits(model)
    model.save_pretrained(tmp_path / "base")
    moda_attn.save_pretrained(model, tmp_path / "moda")
    base = type(model).from_pretrained(tmp_path / "base").eval()
    moda_attn.load_pretrained(base, tmp_path / "moda")
    assert torch.equal(logits(base), expected)


def test_loading_casts_to_the_dtype_of_the_model(tmp_path: Path):
    model = trained(ModaConfig()).to(torch.bfloat16)
    moda_attn.save_pretrained(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "moda_model.safetensors").values()} == {torch.bfloat16}
    fresh = tiny.build()
    moda_attn.load_pretrained(fresh, tmp_path)
    stored = {name: tensor for name, tensor in model.named_parameters() if ".moda." in name}
    for name, tensor in fresh.named_parameters():
        if name in stored:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, stored[name].float())


def test_what_the_base_model_saves_has_the_moda_part_beside_it(tmp_path: Path):
    """Whatever saves models by `save_pretrained`, such as the Trainer, saves MODA with them."""
    model = trained(ModaConfig())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    moda_attn.load_pretrained(again, tmp_path)
    assert torch.equal(logits(again), expected)

    # A state_dict that is given is the one that is saved, of both.
    other = trained(ModaConfig())
    tiny.randomise(other)
    model.save_pretrained(tmp_path / "given", state_dict=other.state_dict())
    moda_attn.load_pretrained(again, tmp_path / "given")
    assert torch.equal(logits(again), logits(other))
    with pytest.raises(ModaValueError, match=r"state_dict to save has no .*self_attn\.moda"):
        model.save_pretrained(tmp_path / "wrong", state_dict=tiny.build().state_dict())
    model.save_pretrained(tmp_path / "rank-1", is_main_process=False)
    assert not (tmp_path / "rank-1" / "moda_config.json").exists()
    moda_attn.remove(model)
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "moda_config.json").exists()


def test_a_model_of_another_shape(tmp_path: Path):
    moda_attn.save_pretrained(trained(ModaConfig()), tmp_path)
    model = tiny.build()
    plain = logits(model)
    text = model.config.text_config
    del model.model.language_model.layers[2]
    with pytest.raises(ModaValueError, match=r"layers 3, the model has 2$"):
        moda_attn.load_pretrained(model, tmp_path)
    assert moda_attn.hf.patch.runtime_of(model) is None

    # The number of key heads is in the shape of no parameter.
    record = json.loads((tmp_path / "moda_config.json").read_text())
    assert record["shape"] == {"layers": 3, "num_heads": 4, "num_kv_heads": text.num_key_value_heads, "head_dim": 8}
    record["shape"] |= {"num_kv_heads": 4, "head_dim": 16}
    (tmp_path / "moda_config.json").write_text(json.dumps(record))
    model = tiny.build()
    with pytest.raises(ModaValueError, match=r"do not fit Llava.*: num_kv_heads 4, the model has 2; head_dim 16, the"):
        moda_attn.load_pretrained(model, tmp_path)
    assert torch.equal(logits(model), plain)
    assert not any(".moda." in name for name in model.state_dict())


def test_what_is_refused(tmp_path: Path):
    model = tiny.build()
    with pytest.raises(ModaValueError, match="not patched"):
        moda_attn.save_pretrained(model, tmp_path)
    with pytest.raises(ModaValueError, match=r"holds no moda_config\.json"):
        moda_attn.load_pretrained(model, tmp_path)
    moda_attn.save_pretrained(trained(ModaConfig()), tmp_path)
    weights_file, config_file = tmp_path / "moda_model.safetensors", tmp_path / "moda_config.json"
    weights, record = load_file(weights_file), json.loads(config_file.read_text())

    other = trained(ModaConfig(mask="none"))
    with pytest.raises(ModaValueError, match="already patched"):
        moda_attn.load_pretrained(other, tmp_path)

    name = "layers.0.aligner.fuser.mix"
    broken = weights | {name: weights[name][:1].clone(), "layers.9.mask.base": torch.zeros(1)}
    del broken["layers.2.mask.decay"]
    save_file(broken, weights_file)
    message = (
        r"missing layers\.2\.mask\.decay; unknown layers\.9\.mask\.base; layers\.0\.aligner\.fuser\.mix is \(1, 8, 8\)"
    )
    with pytest.raises(ModaValueError, match=message):
        moda_attn.load_pretrained(model, tmp_path)
    assert moda_attn.hf.patch.runtime_of(model) is None
    patched = trained(ModaConfig())
    expected = logits(patched)
    with pytest.raises(ModaValueError, match=message):
        moda_attn.load_pretrained(patched, tmp_path)
    assert torch.equal(logits(patched), expected)

    config_file.write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(ModaValueError, match="has format 2; this version reads 1"):
        moda_attn.load_pretrained(model, tmp_path)

    config_file.write_text("not JSON")
    with pytest.raises(ModaValueError, match=r"moda_config\.json is not what save_pretrained writes"):
        moda_attn.load_pretrained(model, tmp_path)
