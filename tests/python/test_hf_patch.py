"""apply and remove: identity at the start, exact undoing, reports, and everything that must be refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError, ModaTypeError, ModaValueError
from moda_attn.hf.attention import patched_class

ALIGN_ONLY = ModaConfig(mask="none", location_prior=False)


def logits(model: nn.Module, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_alignment_starts_as_the_identity_exactly(family: str, implementation: str, pad: str):
    model = tiny.build(family)
    model.set_attn_implementation({"text_config": implementation})
    x = tiny.inputs(family, ["TTITTT", "TTTTITTTT"], pad=pad)
    # The patch counts positions without padding, as `generate` does.
    plain = logits(model, **x, position_ids=positions(x))
    report = moda_attn.apply(model, ALIGN_ONLY)
    assert report.attention == implementation
    assert torch.equal(logits(model, **x), plain)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kernel_in_place_of_torch_changes_rounding_only(family: str):
    model = tiny.build(family)
    x = tiny.inputs(family, ["TTITTT", "TTTTITTTT"])
    plain = logits(model, **x)
    report = moda_attn.apply(model, ALIGN_ONLY, attention="moda")
    assert report.attention == "moda"
    real = x["attention_mask"].bool()
    assert (logits(model, **x) - plain)[real].abs().max() < 1e-4
    tiny.randomise(model)
    assert (logits(model, **x) - plain)[real].abs().max() > 0.1


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    """How many hooks every module has; transformers puts some of its own there at the first forward."""
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("config", [ModaConfig(), ALIGN_ONLY, ModaConfig.released()])
def test_remove_is_exact(family: str, config: ModaConfig):
    model = tiny.build(family)
    x = tiny.inputs(family, ["TTITTT"])
    plain, keys, classes = logits(model, **x), list(model.state_dict()), [type(module) for module in model.modules()]
    hooked = hooks(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    moda_attn.apply(model, config)
    tiny.randomise(model)
    changed = logits(model, **x)
    model.generate(**x, max_new_tokens=2, do_sample=False)
    moda_attn.remove(model)
    assert not torch.equal(changed, plain)
    assert torch.equal(logits(model, **x), plain)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert hooks(model) == hooked
    assert model.model.language_model.config._attn_implementation == "sdpa"
    with pytest.raises(ModaValueError, match="not patched"):
        moda_attn.remove(model)


def test_looking_at_attention_weights_leaves_nothing_behind():
    """transformers 4 leaves a bound forward on every module that it watched: it would hide the patch and outlive it."""
    model = tiny.build()
    x = tiny.inputs("llava-llama", ["TTITTT"])
    model.set_attn_implementation({"text_config": "eager"})
    plain = logits(model, **x, output_attentions=True)
    moda_attn.apply(model, ALIGN_ONLY)
    tiny.randomise(model)
    patched = logits(model, **x, output_attentions=True)
    assert (patched - plain).abs().max() > 0.1
    assert torch.equal(logits(model, **x), patched)
    moda_attn.remove(model)
    assert torch.equal(logits(model, **x), plain)
    moda_attn.apply(model, ALIGN_ONLY)
    assert torch.equal(logits(model, **x), plain)


def test_apply_reports_and_is_idempotent():
    model = tiny.build()
    before = sum(parameter.numel() for parameter in model.parameters())
    config = ModaConfig(layers=(0, 2))
    report = moda_attn.apply(model, config)
    assert (report.layers, report.skipped) == ((0, 2), {1: "not in config.layers"})
    assert sum(parameter.numel() for parameter in model.parameters()) - before == report.parameters > 0
    assert not report.already
    tiny.randomise(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = moda_attn.apply(model, config)
    assert again.already
    assert again.layers == report.layers
    assert "already patched" in str(again)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ModaValueError, match="remove first"):
        moda_attn.apply(model, ModaConfig())


def test_a_layer_left_out_attends_plainly():
    """With parameters in layer 1 alone, moving them changes layer 1's output and what follows, not layer 0's."""
    model = tiny.build()
    x = tiny.inputs("llava-llama", ["TTITTT", "TIT"])
    with torch.no_grad():
        plain = model(**x, output_hidden_states=True, position_ids=positions(x)).hidden_states
        moda_attn.apply(model, ModaConfig(layers=(1,)))
        tiny.randomise(model)
        patched = model(**x, output_hidden_states=True).hidden_states
    real = x["attention_mask"].bool()
    assert (patched[1] - plain[1])[real].abs().max() < 1e-5
    assert (patched[2] - plain[2])[real].abs().max() > 1e-2


def positions(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return (x["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def test_parameter_names_of_the_base_model_stay():
    model = tiny.build()
    names = set(model.state_dict())
    moda_attn.apply(model)
    added = set(model.state_dict()) - names
    assert names <= set(model.state_dict())
    assert added
    assert all(".self_attn.moda." in name for name in added)


def test_a_deep_copy_is_independent():
    model = tiny.build()
    x = tiny.inputs("llava-llama", "TTITTT")
    plain = logits(model, **x)
    moda_attn.apply(model)
    tiny.randomise(model)
    patched = logits(model, **x)
    twin = copy.deepcopy(model)
    moda_attn.remove(model)
    assert torch.equal(logits(model, **x), plain)
    assert torch.equal(logits(twin, **x), patched)
    assert twin.generate(**x, max_new_tokens=2, do_sample=False).shape[1] == x["input_ids"].shape[1] + 2
    moda_attn.remove(twin)
    assert torch.equal(logits(twin, **x), plain)


def test_a_pickled_model_and_its_cache_are_the_same_model_and_cache(monkeypatch: pytest.MonkeyPatch):
    """Before its first forward: after it transformers leaves hooks in some models that cannot be pickled."""
    model, x = tiny.build(), tiny.inputs("llava-llama", ["TTITTT", "TIT"])
    plain = logits(copy.deepcopy(model), **x)
    moda_attn.apply(model)
    tiny.randomise(model)
    stored = pickle.dumps(model)
    for functions in (AttentionInterface, AttentionMaskInterface):  # a new process does not know it
        monkeypatch.delitem(functions._global_mapping, "moda")
    patched_class.cache_clear()
    twin = pickle.loads(stored)
    expected, found = (logits_and_cache(one, x) for one in (model, twin))
    assert torch.equal(found[0], expected[0])
    cache = pickle.loads(pickle.dumps(found[1]))
    step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": F.pad(x["attention_mask"], (0, 1), value=1)}
    after = [logits(one, **step, past_key_values=kept) for one, kept in ((model, expected[1]), (twin, cache))]
    assert torch.equal(*after)
    moda_attn.remove(twin)
    assert torch.equal(logits(twin, **x), plain)


def logits_and_cache(model: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, object]:
    with torch.no_grad():
        out = model(**x, use_cache=True)
    return out.logits, out.past_key_values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_lower_precision_keep_float32_parameters(dtype: torch.dtype):
    model = tiny.build(dtype=dtype)
    x = tiny.inputs("llava-llama", ["TTITTT", "TIT"])
    x["pixel_values"] = x["pixel_values"].to(dtype)
    moda_attn.apply(model)
    own = [parameter for name, parameter in model.named_parameters() if ".moda." in name]
    assert {parameter.dtype for parameter in own} == {torch.float32}
    model(**x, labels=x["input_ids"]).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in own)
    model.to(dtype)
    assert logits(model, **x).dtype == dtype


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            nn.Linear(2, 2),
            ModaValueError,
            "Linear is not supported; wanted a transformers.PreTrainedModel with an att",
        ),
        ("a path", ModaTypeError, "model must be a torch.nn.Module, got str"),
    ],
)
def test_models_that_are_not_supported(model: object, error: type, message: str):
    with pytest.raises(error, match=message):
        moda_attn.apply(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, nn.Sequential])
def test_a_wrapper_names_what_is_inside(wrap):
    with pytest.raises(ModaValueError, match=r"is a wrapper: apply to the LlavaForConditionalGeneration inside"):
        moda_attn.apply(wrap(tiny.build()))


@pytest.mark.parametrize("config", [ModaConfig(), ModaConfig(decay=0.1, fuser_rank=2)], ids=["slopes", "decay"])
def test_parameters_are_where_the_model_is_and_can_be_trained(config: ModaConfig):
    """Whatever the caller has set as the default, and in layers whose projections have no weights of the usual kind."""
    model = tiny.build()
    for layer in model.model.language_model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Quantized(getattr(layer.self_attn, name)))
    with torch.inference_mode(), torch.device("meta"):
        moda_attn.apply(model, config)
    x = tiny.inputs("llava-llama", "TTITTT")
    model.train()(**x, labels=x["input_ids"]).loss.backward()
    own = [parameter for name, parameter in model.named_parameters() if ".moda." in name]
    assert own
    assert all((p.device.type, p.dtype, p.grad is not None) == ("cpu", torch.float32, True) for p in own)


class Quantized(nn.Module):
    """Stands for the linear layers of quantization libraries, which keep their weights under names of their own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = nn.Parameter(linear.weight.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.packed)


def test_configurations_that_do_not_fit():
    model = tiny.build()
    for config, message in (
        (ModaConfig(layers=(3,)), "the model has 3 layers"),
        (ModaConfig(num_modalities=1, align=(), location_prior=False), "text and vision"),
    ):
        with pytest.raises(ModaValueError, match=message):
            moda_attn.apply(model, config)
    with pytest.raises(ModaTypeError, match="config must be a ModaConfig"):
        moda_attn.apply(model, {"mask": "none"})
    with pytest.raises(ModaValueError, match='attention = "keep" needs'):
        moda_attn.apply(model, ModaConfig(), attention="keep")
    with pytest.raises(ModaValueError, match="attention = 'flash'"):
        moda_attn.apply(model, ModaConfig(), attention="flash")
    assert not any(".moda." in name for name in model.state_dict())


def test_models_in_a_state_that_cannot_be_patched():
    wrapped = tiny.build()
    wrapped.peft_config = {}
    with pytest.raises(ModaValueError, match="PEFT"):
        moda_attn.apply(wrapped)
    foreign = tiny.build()
    attention = foreign.model.language_model.layers[0].self_attn
    attention.forward = lambda *args, **kwargs: None
    with pytest.raises(ModaValueError, match="forward of its own"):
        moda_attn.apply(foreign)
    with pytest.raises(ModaValueError, match="meta device"):
        moda_attn.apply(tiny.build().to("meta"))


def test_a_patched_layer_that_is_not_entered_is_noticed():
    model = tiny.build()
    moda_attn.apply(model)
    attention = model.model.language_model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(ModaRuntimeError, match=r"layers \[1\] were not entered"):
        model(**tiny.inputs("llava-llama", "TIT"))


@pytest.mark.parametrize(
    "how", ["position_ids", "four axes of positions", "attention_mask", "cu_seq_lens_q", "seq_idx"]
)
def test_packed_rows_are_refused(how: str):
    """Two samples of 4 and 5 tokens, in the ways that transformers, and those who mask by themselves, know."""
    model = tiny.build("qwen2-vl" if how == "four axes of positions" else "llava-llama")
    moda_attn.apply(model, ALIGN_ONLY)
    ids, positions = torch.arange(5, 14)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    own = torch.cat([torch.zeros(4), torch.ones(5)])
    mask = (own[:, None] == own) & torch.ones(9, 9, dtype=torch.bool).tril()
    given, why = {
        "position_ids": ({"position_ids": positions}, "position_ids do not rise by one to column 4 of row 0"),
        "four axes of positions": ({"position_ids": positions.expand(4, 1, 9)}, "to column 4 of row 0"),
        "attention_mask": ({"attention_mask": mask[None, None]}, "the token at 4 of row 0 does not see the one before"),
        "cu_seq_lens_q": ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "the call brings cu_seq_lens_q"),
        "seq_idx": ({"seq_idx": own.int()[None]}, "the call brings seq_idx"),
    }[how]
    with pytest.raises(ModaValueError, match=f"packed rows are not supported: .*{why}"):
        model(input_ids=ids, **given)


def test_a_soft_cap_is_refused_when_our_kernel_would_ignore_it():
    model = tiny.build("gemma3")
    for layer in model.model.language_model.layers:
        layer.self_attn.attn_logit_softcapping = 50.0
    with pytest.raises(ModaValueError, match=r"soft cap on its scores \(attn_logit_softcapping\)"):
        moda_attn.apply(model)
    assert moda_attn.apply(model, ALIGN_ONLY).attention == "sdpa"


def test_the_kernel_cannot_be_lost_in_silence():
    model = tiny.build()
    x = tiny.inputs("llava-llama", "TIT")
    moda_attn.apply(model)
    model.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(ModaRuntimeError, match="set to 'sdpa' after the patch"):
        model(**x)
    model.set_attn_implementation({"text_config": "moda"})
    model(**x)
    moda_attn.remove(model)
    moda_attn.apply(model, ALIGN_ONLY)
    assert moda_attn.apply(model, ALIGN_ONLY, attention="keep").already
    with pytest.raises(ModaValueError, match="already patched with attention 'sdpa'"):
        moda_attn.apply(model, ALIGN_ONLY, attention="moda")


def test_dropout_is_refused():
    model = tiny.build()
    moda_attn.apply(model)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    x = tiny.inputs("llava-llama", "TIT")
    model.eval()(**x)
    with pytest.raises(ModaValueError, match=r"attention dropout 0\.1"):
        model.train()(**x, labels=x["input_ids"])


def test_tokens_whose_modality_is_unknown():
    model = tiny.build()
    moda_attn.apply(model)
    x = tiny.inputs("llava-llama", "TTT")
    embeds = model.get_input_embeddings()(x["input_ids"])
    with pytest.raises(ModaValueError, match="give modality_ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(ModaValueError, match="modality_ids has shape"):
        model(inputs_embeds=embeds, modality_ids=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ModaValueError, match="modality"):
        model(inputs_embeds=embeds, modality_ids=torch.full((1, 3), 2))
    explicit = torch.zeros(1, 3, dtype=torch.int64)
    expected = logits(model, **x)
    assert torch.equal(logits(model, inputs_embeds=embeds, modality_ids=explicit), expected)
    assert torch.equal(logits(model, inputs_embeds=embeds, mm_token_type_ids=explicit), expected)
    with pytest.raises(ModaRuntimeError, match="not the decoder"):
        model.model.language_model(inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["modality_ids", "mm_token_type_ids"])
def test_dtypes_of_explicit_ids(name: str):
    """All integers mean the same, unsigned ones too, which have no -1 for padding."""
    model, x = tiny.build(), tiny.inputs("llava-llama", ["TIT", "TITT"])
    moda_attn.apply(model)
    expected = logits(model, **x)
    kinds = (x["input_ids"] == tiny.IMAGE).long()
    for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8):
        assert torch.equal(logits(model, **x, **{name: kinds.to(dtype)}), expected)
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(ModaTypeError, match=rf"{name} has dtype {dtype}; wanted integers"):
            model(**x, **{name: kinds.to(dtype)})


def test_training_must_say_where_the_prompt_ends():
    model = tiny.build().train()
    x = tiny.inputs("llava-llama", "TIT")
    moda_attn.apply(model)
    with pytest.raises(ModaValueError, match="where the prompt ends"):
        model(**x)
    model(**x, labels=x["input_ids"])
    model(**x, moda_context=torch.ones_like(x["input_ids"], dtype=torch.bool))
    with pytest.raises(ModaValueError, match="moda_context"):
        model(**x, moda_context=torch.ones(1, 2, dtype=torch.bool))


def test_the_core_can_be_called_alone():
    model = tiny.build()
    moda_attn.apply(model)
    tiny.randomise(model)
    x = tiny.inputs("llava-llama", ["TTITTT", "TIT"])
    with torch.no_grad():
        hidden = model.model(**x).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**x).logits)
