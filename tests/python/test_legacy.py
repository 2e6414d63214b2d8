"""The original LLaVA and Cambrian-1 code: which token is what, decoding against one-shot, training, undoing."""

from __future__ import annotations

import concurrent.futures
import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legacy_models
import moda_attn
from legacy_models import CODES, IGNORED
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError, ModaValueError
from moda_attn.hf import record_mass
from moda_attn.hf.legacy import cache as legacy_cache
from perturb import randomise

ALIGN_ONLY = ModaConfig(mask="none", location_prior=False)
#: Allowed difference of float32 logits that are of size 1.
TOLERANCE = 1e-5
PADS = ("left", "right")
#: Every row with one image at the same place, as Cambrian wants them.
ROWS = ["TITT", "TITTTTT", "TIT"]


MISSING = {name: reason for name, code in CODES.items() if (reason := code.missing()) is not None}


@pytest.fixture(params=[name for name in CODES if name not in MISSING])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", MISSING)
def test_code_that_is_not_covered_here(name: str):
    pytest.skip(MISSING[name])


def patched(name: str, config: ModaConfig | None = None, pad: str = "right", implementation: str = "sdpa") -> nn.Module:
    model = legacy_models.build(name, implementation, pad)
    moda_attn.apply(model, config)
    randomise(model)
    return model


def logits(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(**arguments).logits


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def with_answers(name: str, rows: list[str], pad: str, tokens: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Inputs of the rows with `tokens` (B, n) behind them, labelled, and their modality."""
    count = tokens.shape[1]
    x, longer = legacy_models.inputs(name, rows, pad), [row + "T" * count for row in rows]
    y = legacy_models.inputs(name, longer, pad)
    y["labels"] = torch.full_like(y["input_ids"], IGNORED)
    for row, (old, new) in enumerate(zip(x["attention_mask"].bool(), y["attention_mask"].bool(), strict=True)):
        y["input_ids"][row, new] = torch.cat([x["input_ids"][row, old], tokens[row]])
        y["labels"][row, new.nonzero()[-count:, 0]] = tokens[row]
    return y, legacy_models.truth(name, longer, pad)


def one_shot(model: nn.Module, name: str, rows: list[str], pad: str, tokens: Tensor) -> Tensor:
    """Logits that predict each of `tokens` (B, n), from one forward over prompt and tokens, as in training."""
    y, modality = with_answers(name, rows, pad, tokens)
    ends = torch.where(modality >= 0, torch.arange(modality.shape[1]), -1).amax(-1)
    spots = ends[:, None] - tokens.shape[1] + torch.arange(tokens.shape[1])
    return logits(model, **y)[torch.arange(len(rows))[:, None], spots]


def step_by_step(model: nn.Module, name: str, rows: list[str], pad: str, tokens: Tensor) -> Tensor:
    """The same logits by hand-made decoding: a prefill, then one token at a time."""
    modality = legacy_models.truth(name, rows, pad)
    mask, ends = (modality >= 0).long(), torch.where(modality >= 0, torch.arange(modality.shape[1]), -1).amax(-1)
    steps = []
    with torch.no_grad():
        out = model(**legacy_models.inputs(name, rows, pad), use_cache=True)
        last = out.logits[torch.arange(len(rows)), ends]
        for token in tokens.unbind(1):
            steps.append(last)
            mask = torch.cat([mask, torch.ones_like(token[:, None])], dim=1)
            cache = out.past_key_values
            out = model(input_ids=token[:, None], attention_mask=mask, past_key_values=cache, use_cache=True)
            last = out.logits[:, -1]
    return torch.stack(steps, dim=1)


def generate(model: nn.Module, x: dict[str, Any], **options: Any) -> Any:
    arguments = {name: value for name, value in x.items() if name != "input_ids"}
    settings = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(x["input_ids"], **arguments, **(settings | options))
    out.sequences = out.sequences[:, -5:]  # transformers 4.37 puts a start token in front that the model never saw
    return out


@pytest.mark.parametrize("pad", PADS)
def test_ids_are_those_of_the_merged_sequence(name: str, pad: str):
    rows = ["TITT", "TTTT", "IITTIT", "T"] if CODES[name].loose else ROWS
    model = patched(name, pad=pad)
    x = legacy_models.inputs(name, rows, pad)
    expected = legacy_models.truth(name, rows, pad)
    for labels in (None, x["input_ids"].clamp(min=0), torch.full_like(x["input_ids"], IGNORED)):
        with record_mass(model) as recorder:
            logits(model, **x, labels=labels)
        assert torch.equal(recorder.layers[0][0].query_modality, expected)


@pytest.mark.parametrize("pad", PADS)
def test_padding_is_known_without_a_mask(name: str, pad: str):
    """The original returns no mask where it was given none, although it pads rows that merge to different lengths."""
    rows = ["TITT", "TTTT"] if CODES[name].loose else ["TITT", "TITT"]
    model = patched(name, pad=pad)
    x = legacy_models.inputs(name, rows, pad)
    expected = legacy_models.truth(name, rows, pad)
    assert (expected < 0).any()
    del x["attention_mask"]
    with record_mass(model) as recorder:
        logits(model, **x)
    assert torch.equal(recorder.layers[0][0].query_modality, expected)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("pad", PADS)
def test_the_merging_method_returns_what_it_returned(name: str, pad: str):
    plain, model = legacy_models.build(name, pad=pad), patched(name, pad=pad)
    x = legacy_models.inputs(name, ROWS, pad)
    ids, mask = x["input_ids"], x["attention_mask"]
    labels = ids.clamp(min=0).masked_fill(torch.rand(ids.shape) < 0.5, IGNORED)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    sizes = {"image_sizes": x.get("image_sizes")}
    for arguments in (
        (ids, None, mask, None, labels, x["images"]),
        (ids, positions, mask.bool(), None, None, x["images"]),
        (ids, None, None, None, labels, x["images"]),
        (ids, None, None, None, None, x["images"]),
        (ids.clamp(min=0), None, mask, None, labels, None),
        (ids.clamp(min=0), positions, None, None, None, None),
        (ids[:, :1], None, mask, None, labels[:, :1], x["images"]),
    ):
        with torch.no_grad():
            expected = plain.prepare_inputs_labels_for_multimodal(*arguments, **sizes)
            found = model.prepare_inputs_labels_for_multimodal(*arguments, **sizes)
        assert len(found) == len(expected)
        assert same(found, expected)


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
    assert difference(logits(model, **x)[modality >= 0], plain[modality >= 0]) > 1


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


@pytest.mark.parametrize(
    "config",
    [ModaConfig(), ALIGN_ONLY, ModaConfig(combine="split", fuser_rank=2), ModaConfig(mask="learned", basis="gram")],
    ids=["default", "align only", "split", "learned"],
)
def test_generation_equals_one_full_forward(name: str, config: ModaConfig):
    model = patched(name, config, pad="left")
    out = generate(model, legacy_models.inputs(name, ROWS, "left"))
    steps = torch.stack(out.scores, dim=1)
    assert difference(steps, one_shot(model, name, ROWS, "left", out.sequences)) < TOLERANCE
    assert difference(steps, step_by_step(model, name, ROWS, "left", out.sequences)) < TOLERANCE
    moda_attn.remove(model)
    assert difference(steps, one_shot(model, name, ROWS, "left", out.sequences)) > 1


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [ModaConfig(), ALIGN_ONLY], ids=["default", "align only"])
def test_decoding_by_hand_equals_one_full_forward(name: str, config: ModaConfig, implementation: str, pad: str):
    model = patched(name, config, pad, implementation)
    tokens = torch.randint(2, legacy_models.VOCABULARY, (3, 4))
    steps = step_by_step(model, name, ROWS, pad, tokens)
    assert difference(steps, one_shot(model, name, ROWS, pad, tokens)) < TOLERANCE


def test_forgetting_the_basis_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    """Negative control of the tests above."""
    model = patched(name)
    tokens = torch.randint(2, legacy_models.VOCABULARY, (3, 4))
    keep = legacy_cache.LegacySeam.update

    def forget(self: Any, *args: Any) -> Any:
        result = keep(self, *args)
        state = self.cache.states[args[2]]
        self.cache.states[args[2]] = replace(state, basis=torch.zeros_like(state.basis))
        return result

    monkeypatch.setattr(legacy_cache.LegacySeam, "update", forget)
    steps = step_by_step(model, name, ROWS, "right", tokens)
    assert difference(steps, one_shot(model, name, ROWS, "right", tokens)) > 0.1


def test_rows_are_the_same_alone(name: str):
    """Padding, and what else is in the batch, changes nothing."""
    for pad in PADS:
        model = patched(name, pad=pad)
        x, modality = legacy_models.inputs(name, ROWS, pad), legacy_models.truth(name, ROWS, pad)
        together = logits(model, **x)
        for row in range(len(ROWS)):
            alone = {key: value[row : row + 1] for key, value in x.items() if key != "images"}
            alone["input_ids"] = alone["input_ids"][:, x["attention_mask"][row].bool()]
            del alone["attention_mask"]
            images = x["images"]
            per_tower = isinstance(images, list) and images[0].shape[0] == len(ROWS) and images[0].shape[1] == 3
            per_tower = per_tower and "cambrian" in name
            alone["images"] = [tower[row : row + 1] for tower in images] if per_tower else images[row : row + 1]
            assert difference(logits(model, **alone)[0], together[row, modality[row] >= 0]) < TOLERANCE


@pytest.mark.parametrize("options", [{"num_beams": 3, "length_penalty": 0.0}, {"do_sample": True, "top_k": 0}])
def test_every_beam_and_sample_has_its_own_state(name: str, options: dict[str, Any]):
    if name == "cambrian-sva":
        pytest.skip("Cambrian's SVA updates as many rows as there are images: its own beams differ from single rows")
    model = patched(name, pad="left")
    x = legacy_models.inputs(name, ROWS, "left")
    out = generate(model, x, **({"num_return_sequences": 3} | options))
    for sample in range(3):
        tokens = out.sequences.view(3, 3, -1)[:, sample]
        expected = one_shot(model, name, ROWS, "left", tokens)
        if "num_beams" in options:
            odds = expected.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
            assert difference(out.sequences_scores.view(3, 3)[:, sample], odds) < 1e-4
        else:
            steps = torch.stack(out.scores, dim=1).view(3, 3, tokens.shape[1], -1)[:, sample]
            assert difference(steps, expected) < TOLERANCE


def test_threads_do_not_mix_up_their_prompts(name: str):
    """Both merge before either decodes, to shapes that fit each other's ids."""
    if name == "cambrian-sva":
        pytest.skip("Cambrian's SVA keeps the image features of its last generate on the model")
    model, pause = patched(name), threading.Barrier(2, timeout=300)
    batches = [legacy_models.inputs(name, [row]) for row in ("TITTT", "TTITT" if CODES[name].loose else "TITTT")]
    if not CODES[name].loose:
        batches[1] = {key: value for key, value in batches[1].items() if not key.startswith("image")}
        batches[1]["input_ids"] = torch.randint(2, legacy_models.VOCABULARY, (1, 5))
    alone = [generate(model, x).scores for x in batches]
    waiting = model.model.register_forward_pre_hook(lambda *_: (pause.wait(), None)[1])
    with concurrent.futures.ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(lambda x: generate(model, x).scores, batches))
    waiting.remove()
    for expected, found in zip(alone, together, strict=True):
        assert torch.equal(torch.stack(found), torch.stack(expected))


def test_text_alone(name: str):
    """The original method returns early, or is not called at all."""
    rows = ["TTTT", "TTTTTT"]
    model = patched(name, pad="left")
    x = legacy_models.inputs(name, rows, "left")
    for unwanted in ("images", "image_sizes"):
        x.pop(unwanted, None)
    out = generate(model, x)
    y, modality = with_answers(name, rows, "left", out.sequences)
    y = {key: value for key, value in y.items() if not key.startswith("image")}
    with record_mass(model) as recorder:
        expected = logits(model, **y)[:, -6:-1]
    assert torch.equal(recorder.layers[0][0].query_modality, modality)
    assert difference(torch.stack(out.scores, dim=1), expected) < TOLERANCE


def test_a_later_token_changes_no_earlier_logit(name: str):
    model = patched(name).train()
    tokens = torch.randint(2, legacy_models.VOCABULARY, (1, 5))
    y, modality = with_answers(name, ["TITT"], "right", tokens)
    before = model(**y).logits
    for position in range(5):
        other = copy.deepcopy(y)
        spot = y["input_ids"].shape[1] - 5 + position
        other["input_ids"][0, spot] = (other["input_ids"][0, spot] + 17) % 60 + 2
        after = model(**other).logits
        merged = modality.shape[1] - 5 + position
        assert torch.equal(after[:, :merged], before[:, :merged])
        assert difference(after[:, merged:], before[:, merged:]) > 0.1


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
