"""Models of no known family: found by their structure, told by explicit ids, or refused with what was looked for."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import matrix
import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError, ModaValueError
from moda_attn.hf import FAMILIES, Family
from moda_attn.hf.structure import find_structure
from tiny_configs import TEXT, VISION


def test_every_family_is_found_where_it_keeps_its_decoder():
    for family, builder in tiny.BUILDERS.items():
        model = tiny.build(family)
        structure = find_structure(model)
        assert structure.decoder == builder.decoder
        assert (structure.stack, structure.attention, structure.text_config) == ("layers", "self_attn", "text_config")
        assert structure.owners == ("", "model")
    assert {type(tiny.build(family)).__name__ for family in tiny.ALL} == {row.model for row in FAMILIES.values()}


def test_the_cross_attention_of_mllama_is_skipped_and_says_so():
    model = tiny.build("mllama")
    report = moda_attn.apply(model)
    assert report.layers == (0, 2, 3)
    assert report.skipped == {
        1: "MllamaTextCrossAttention: cross-attention, whose keys are not the text decoder's own tokens"
    }
    assert "3 layers, 1 skipped (1: MllamaTextCrossAttention: cross-attention" in str(report)
    assert model.model.language_model.layers[1].cross_attn.config._attn_implementation == "sdpa"
    moda_attn.remove(model)
    with pytest.raises(ModaValueError, match="layers has 1, which cannot be patched: MllamaTextCrossAttention"):
        moda_attn.apply(model, ModaConfig(layers=(0, 1)))
    assert moda_attn.apply(model, ModaConfig(layers=(2,))).skipped[0] == "not in config.layers"


def other_model() -> nn.Module:
    """A text model whose user gives it images as tokens of its own vocabulary."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(15.0 if "q_proj" in name or "k_proj" in name else 6.0)
    return model


IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 0, 12, 13, 14, 15, 16]])
KINDS = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]])
X = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


@pytest.mark.parametrize("config", [matrix.ALIGN_ONLY, ModaConfig()], ids=["torch's attention", "own kernel"])
@pytest.mark.parametrize("name", ["modality_ids", "mm_token_type_ids"])
def test_an_unknown_model_is_told_by_explicit_ids(name: str, config: ModaConfig):
    model = other_model()
    plain = matrix.logits(model, X)
    report = moda_attn.apply(model, config)
    assert report.layers == (0, 1, 2)
    assert (matrix.logits(model, X | {name: KINDS}) - plain)[X["attention_mask"].bool()].abs().max() < (
        1e-9 if config is matrix.ALIGN_ONLY else 10
    )
    tiny.randomise(model)
    tokens, steps = matrix.generated(model, X | {name: KINDS})
    # The prompt's words are repeated for beams, and later tokens are text.
    more = X | {
        "input_ids": torch.cat([IDS, tokens], 1),
        "attention_mask": torch.cat([X["attention_mask"], torch.ones_like(tokens)], 1),
        name: torch.cat([KINDS, torch.zeros_like(tokens)], 1),
        "labels": torch.cat([torch.full_like(IDS, -100), tokens], 1),
    }
    more["position_ids"] = (more["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert matrix.difference(steps, matrix.logits(model, more)[:, IDS.shape[1] - 1 : -1]) < matrix.TOLERANCE
    text = matrix.logits(model, more | {name: torch.zeros_like(more[name])})
    assert matrix.difference(steps, text[:, IDS.shape[1] - 1 : -1]) > 100 * matrix.TOLERANCE
    moda_attn.remove(model)
    assert torch.equal(matrix.logits(model, X), plain)


def test_an_unknown_model_without_ids_raises():
    model = other_model()
    moda_attn.apply(model)
    for call in (model, model.generate):
        with pytest.raises(ModaValueError, match="of no family whose placeholders are known: give modality_ids"):
            call(**X)
    with pytest.raises(ModaRuntimeError, match="without modality ids"):
        model.model(**X)


def test_a_family_can_be_made_known(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(5)
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 4}
    config = hf.Cohere2VisionConfig(
        vision_config=vision,
        text_config={"model_type": "cohere2", **TEXT},
        downsample_factor=2,
        image_token_id=tiny.IMAGE,
    )
    model = hf.Cohere2VisionForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, *[tiny.IMAGE] * 4, 6, 7]])
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
    moda_attn.apply(model)
    with pytest.raises(ModaValueError, match=r"or name its placeholders in moda_attn\.hf\.FAMILIES"):
        model(**x)
    moda_attn.remove(model)
    monkeypatch.setitem(FAMILIES, "cohere2_vision", Family("Cohere2VisionForConditionalGeneration"))
    moda_attn.apply(model)
    tiny.randomise(model)
    expected = matrix.logits(model, x | {"modality_ids": (ids == tiny.IMAGE).long()})
    assert torch.equal(matrix.logits(model, x), expected)
    assert matrix.difference(matrix.logits(model, x | {"modality_ids": torch.zeros_like(ids)}), expected) > 1e-3


def test_labels_of_whole_rows_do_not_mark_a_prompt():
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT, num_labels=3)).eval()
    moda_attn.apply(model)
    x = X | {"modality_ids": KINDS, "labels": torch.tensor([0, 2])}
    everything = {"moda_context": torch.ones_like(IDS, dtype=torch.bool)}
    assert torch.equal(model(**x).logits, model(**x, **everything).logits)
    with pytest.raises(ModaValueError, match=r"labels of shape \(2,\) do not say it"):
        model.train()(**x)
    model(**x, **everything).loss.backward()


def test_the_model_inside_the_model_can_be_patched_alone():
    """`LlavaModel` is what people train heads of their own on; its family is known by its configuration."""
    whole = tiny.build("llava-llama")
    x = tiny.inputs("llava-llama", matrix.ROWS)
    expected = matrix.logits(matrix.patched("llava-llama"), x)
    core = whole.model
    report = moda_attn.apply(core, matrix.ALIGN_ONLY)
    assert report.layers == (0, 1, 2)
    tiny.randomise(core)
    with torch.no_grad():
        assert torch.equal(whole.lm_head(core(**x).last_hidden_state), expected)
    moda_attn.remove(core)
    decoder = whole.model.language_model
    moda_attn.apply(decoder, matrix.ALIGN_ONLY)
    decoder(**X, modality_ids=KINDS)


class Subclass(hf.LlavaForConditionalGeneration):
    """A model of a user's, of a known family."""


def test_a_subclass_is_of_its_family():
    model = Subclass(tiny.build("llava-llama").config)
    moda_attn.apply(model)
    model.generate(**tiny.inputs("llava-llama", ["TITT"]), max_new_tokens=2)


class LateRotation(nn.Module):
    """Rotates its keys after they went to the cache: what is cached could not be aligned."""

    layer_idx = 0

    def forward(self, hidden_states: Tensor, past_key_values=None, **kwargs) -> Tensor:
        key, value = past_key_values.update(hidden_states, hidden_states, self.layer_idx)
        return self.rotary_emb(key) @ value


class NoCache(nn.Module):
    layer_idx = 0

    def forward(self, hidden_states: Tensor, past_key_values=None, **kwargs) -> Tensor:
        return hidden_states


class OtherIndex(nn.Module):
    layer_idx = 3

    def forward(self, hidden_states: Tensor, past_key_values=None, **kwargs) -> Tensor:
        return past_key_values.update(hidden_states, hidden_states, self.layer_idx)[0]


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (LateRotation, "LateRotation: rotates its keys after they went to the cache"),
        (NoCache, "NoCache: never calls past_key_values.update"),
        (OtherIndex, "OtherIndex: its layer_idx is 3, wanted 0"),
    ],
)
def test_a_model_without_the_seam_is_refused_with_what_was_looked_for(attention: type, reason: str):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(TEXT | {"num_hidden_layers": 1})))
    model.model.layers[0].self_attn = attention()
    with pytest.raises(
        ModaValueError, match=r"no layer with an attention whose forward takes past_key_values"
    ) as error:
        moda_attn.apply(model)
    assert reason in str(error.value)


def test_models_without_a_text_decoder_or_with_two_are_refused():
    vision = hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))
    with pytest.raises(ModaValueError, match="CLIPVisionModel is not supported: no layer with an attention"):
        moda_attn.apply(vision)
    two = other_model()
    two.second = other_model()
    with pytest.raises(ModaValueError, match=r"it has 2 decoders, model\.layers, second\.model\.layers; wanted one"):
        moda_attn.apply(two)


def test_a_layer_of_another_kind_is_skipped_and_reported():
    """As in hybrid models, where some layers have no keys at all."""
    model = tiny.build("llava-llama")
    layers = model.model.language_model.layers
    layers[1].self_attn = NoCache()
    assert moda_attn.apply(model).skipped == {1: "NoCache: never calls past_key_values.update"}


def test_videos_are_a_third_modality_or_vision():
    family = "llava-next-video"
    with pytest.raises(ModaValueError, match="align"):
        ModaConfig(align=("text", "video"))
    model = tiny.build(family)
    config = ModaConfig(num_modalities=3, align=("text", "vision", "video"))
    assert config.align_ids == (0, 1, 2)
    moda_attn.apply(model, config)
    x = tiny.inputs(family, ["TIVTT"])
    kinds = tiny.modality(family, x)
    expected = matrix.logits(model, x)
    assert torch.equal(matrix.logits(model, x | {"modality_ids": kinds}), expected)
    assert torch.equal(matrix.logits(model, x | {"mm_token_type_ids": kinds}), expected)
    moda_attn.remove(model)
    moda_attn.apply(model, ModaConfig())
    expected = matrix.logits(model, x)
    assert torch.equal(matrix.logits(model, x | {"mm_token_type_ids": kinds}), expected)
    with pytest.raises(ModaValueError, match="modality"):
        matrix.logits(model, x | {"modality_ids": kinds})
