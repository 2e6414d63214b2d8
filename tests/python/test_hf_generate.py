"""Causality, the key/value cache, padding, the make-up of rows: per-step logits against independent one-shot runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moda_attn
import tiny
from decoding import TOLERANCE, difference, generated, one_shot, patched, step_by_step
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError, ModaValueError
from moda_attn.hf import seam
from moda_attn.hf.ids import describe_call
from moda_attn.hf.registry import MediaTokens

CONFIGS = {
    "default": ModaConfig(),
    "split": ModaConfig(combine="split", fuser_rank=2),
    "learned": ModaConfig(mask="learned", basis="gram"),
    "released": ModaConfig.released(),
    "mlp": ModaConfig(aligner="mlp2_gelu", mask="fixed"),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_equals_one_full_forward(family: str):
    model = patched(family)
    x = tiny.inputs(family, ["TTITTT", "TITTTTITT", "TTT"])
    tokens, steps = generated(model, x)
    assert difference(steps, one_shot(model, x, tokens)) < TOLERANCE
    assert difference(steps, step_by_step(model, x, tokens)) < TOLERANCE
    moda_attn.remove(model)
    assert difference(steps, one_shot(model, x, tokens)) > 0.1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_generation_equals_one_full_forward_in_every_configuration(config: ModaConfig):
    # The released configuration has no prompt: its one-shot forward leaks, which is what another test shows.
    config = replace(config, context="prompt")
    model = patched(config=config)
    x = tiny.inputs("llava-llama", ["TTITTT", "TITTTTITT"])
    tokens, steps = generated(model, x)
    assert difference(steps, one_shot(model, x, tokens)) < TOLERANCE


def test_forgetting_the_basis_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control of the tests above."""
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT", "TITTTTITT"])
    kept = seam.remember
    monkeypatch.setattr(
        seam, "remember", lambda cache, layer, state, *rest: kept(cache, layer, replace(state, basis=None), *rest)
    )
    tokens, steps = generated(model, x)
    assert difference(steps, one_shot(model, x, tokens)) > 0.1


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
@pytest.mark.parametrize("config", [CONFIGS["default"], replace(CONFIGS["released"], context="prompt")])
def test_other_caches_give_the_same_logits(options: dict, config: ModaConfig):
    model = patched(config=config)
    x = tiny.inputs("llava-llama", ["TTITTT", "TITTTTITT"])
    tokens, steps = generated(model, x)
    again, other = generated(model, x, **options)
    assert torch.equal(tokens, again)
    assert difference(steps, other) < TOLERANCE


def test_beam_search_keeps_each_beam_its_own_state():
    """The score of every returned sequence equals the sum of its log probabilities from an independent forward."""
    model = patched()
    # Older releases of transformers mix up the beams' images where rows have different numbers of them.
    images = 2 if tiny.RELEASE >= (5, 18) else 1
    x = tiny.inputs("llava-llama", ["TTITTT", "TITTTTITT" if images == 2 else "TTITTTTTTTTT"])
    out = model.generate(
        **x,
        max_new_tokens=6,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        length_penalty=0.0,
        suppress_tokens=[tiny.IMAGE],
        output_scores=True,
        return_dict_in_generate=True,
    )
    length = x["input_ids"].shape[1]
    for index, sequence in enumerate(out.sequences):
        row = index // 4
        own = slice(0, 1) if row == 0 else slice(1, 1 + images)
        alone = {name: x[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        alone["pixel_values"] = x["pixel_values"][own]
        tokens = sequence[None, length:]
        chosen = one_shot(model, alone, tokens).log_softmax(-1).gather(-1, tokens[..., None])
        assert chosen.sum().item() == pytest.approx(out.sequences_scores[index].item(), abs=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_later_token_changes_no_earlier_logit(family: str):
    model = patched(family).train()
    x = tiny.inputs(family, ["TTITTTTTTT"])
    labels = x["input_ids"].clone()
    first = x["input_ids"].shape[1] - 5
    labels[:, :first] = -100
    before = model(**x, labels=labels).logits
    for position in range(first, x["input_ids"].shape[1]):
        other = x["input_ids"].clone()
        other[0, position] = (other[0, position] + 17) % 60 + 2
        after = model(**(x | {"input_ids": other}), labels=labels).logits
        assert torch.equal(after[:, :position], before[:, :position])
        assert difference(after[:, position:], before[:, position:]) > 0.1


def test_with_context_all_a_later_token_does_change_earlier_logits():
    """The leak of the released code, kept for parity."""
    model = patched(config=ModaConfig(context="all")).train()
    x = tiny.inputs("llava-llama", ["TTITTTTTTT"])
    labels = x["input_ids"].clone()
    labels[:, :-5] = -100
    other = x["input_ids"].clone()
    other[0, -1] = other[0, -1] % 60 + 2
    before, after = (model(**(x | {"input_ids": ids}), labels=labels).logits for ids in (x["input_ids"], other))
    assert difference(before[:, :-1], after[:, :-1]) > 1e-2


def test_what_was_generated_changes_no_earlier_step():
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT"])
    first = torch.tensor([[5, 6, 7, 8]])
    second = torch.tensor([[5, 6, 9, 11]])
    a, b = step_by_step(model, x, first), step_by_step(model, x, second)
    assert torch.equal(a[:, :3], b[:, :3])
    assert difference(a[:, 3], b[:, 3]) > 0.1


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_changes_nothing(family: str, pad: str):
    model = patched(family)
    rows = ["TTITTT", "TITTTTITT", "TTTT"]
    x = tiny.inputs(family, rows, pad=pad)
    with torch.no_grad():
        together = model(**x).logits
    image = 0
    for row, letters in enumerate(rows):
        real = x["attention_mask"][row].bool()
        alone = {"input_ids": x["input_ids"][row : row + 1, real]}
        count = letters.count("I")
        if count:
            alone["pixel_values"] = x["pixel_values"][image : image + count]
            if "image_sizes" in x:
                alone["image_sizes"] = x["image_sizes"][image : image + count]
        image += count
        with torch.no_grad():
            assert difference(model(**alone).logits[0], together[row, real]) < TOLERANCE


def test_padded_rows_generate_as_they_do_alone():
    model = patched()
    rows = ["TTITTT", "TITTTTITT", "TTTT"]
    x = tiny.inputs("llava-llama", rows)
    tokens, steps = generated(model, x)
    images = {0: slice(0, 1), 1: slice(1, 3)}
    for row in range(3):
        real = x["attention_mask"][row].bool()
        alone = {
            "input_ids": x["input_ids"][row : row + 1, real],
            "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.int64),
        }
        if row in images:
            alone["pixel_values"] = x["pixel_values"][images[row]]
        assert difference(one_shot(model, alone, tokens[row : row + 1])[0], steps[row]) < TOLERANCE


def test_pad_embeddings_matter_to_nothing():
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT", "TIT"])
    real = x["attention_mask"].bool()
    with torch.no_grad():
        before = model(**x).logits[real]
        weight = model.get_input_embeddings().weight
        weight[tiny.PAD] += torch.randn(weight.shape[1])
        assert torch.equal(model(**x).logits[real], before)


def test_text_only_batches():
    """No image anywhere: the other modality's basis is zero, and the placeholder id is an ordinary token."""
    model = patched()
    x = tiny.inputs("llava-llama", ["TTTT", "TTTTTT"])
    x["input_ids"][0, -1] = tiny.IMAGE
    tokens, steps = generated(model, x)
    assert steps.isfinite().all()
    assert difference(steps, one_shot(model, x, tokens)) < TOLERANCE


def test_a_generated_placeholder_is_text():
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT"])
    placeholder = torch.tensor([[tiny.IMAGE, 5]])
    ordinary = step_by_step(model, x, placeholder)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[9] = weight[tiny.IMAGE]
    assert difference(ordinary, step_by_step(model, x, torch.tensor([[9, 5]]))) == 0


@pytest.mark.parametrize(
    "name", ["pixel_values", "mm_encoder_outputs", "cross_attention_states", "image_hidden_states"]
)
def test_a_placeholder_is_image_however_its_features_come(name: str):
    """As pixels, or computed before: as `generate` does, as Mllama takes them, and Idefics in older releases."""
    ids = torch.tensor([[5, tiny.IMAGE, 6]])
    options = {"context": "all", "training": False, "prompt_length": None}
    tokens = MediaTokens(image=tiny.IMAGE)
    call = describe_call({"input_ids": ids, name: torch.zeros(1)}, tokens, **options)
    assert call.modality.tolist() == [[0, 1, 0]]
    assert describe_call({"input_ids": ids}, tokens, **options).modality.tolist() == [[0, 0, 0]]


def test_images_reach_the_answer_through_the_basis():
    """With attention to images forbidden the text still sees them: its keys are mapped by the vision basis."""
    model = patched()
    x = tiny.inputs("llava-llama", ["ITTT"])
    with torch.no_grad():
        before = model(**x).logits
        x["pixel_values"] = torch.randn(x["pixel_values"].shape)
        after = model(**x).logits
    assert difference(before[:, 4:], after[:, 4:]) > 1e-3


def test_caches_that_were_filled_elsewhere_are_refused():
    model = tiny.build()
    x = tiny.inputs("llava-llama", ["TTITTT"])
    with torch.no_grad():
        cache = model(**x, use_cache=True).past_key_values
    moda_attn.apply(model)
    with pytest.raises(ModaRuntimeError, match="did not put there"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_cache_survives_crop_and_reset():
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT"])
    token = torch.tensor([[5]])
    with torch.no_grad():
        cache = model(**x, use_cache=True).past_key_values
        expected = model(input_ids=token, past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(model(input_ids=token, past_key_values=cache).logits, expected)
        if tiny.RELEASE < (5, 18):
            return  # a dynamic cache's `reset` makes zeros of its keys there, and keeps them
        cache.reset()
        model(**x, past_key_values=cache)
        assert torch.equal(model(input_ids=token, past_key_values=cache).logits, expected)


def test_a_later_turn_is_aligned_with_the_prompts_bases():
    """Several text tokens at once on a filled cache equal the same tokens one at a time; late images are refused."""
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT"])
    turn = torch.tensor([[5, 6, 7, 8]])
    expected = step_by_step(model, x, turn)
    with torch.no_grad():
        out = model(**x, use_cache=True)
        cache = out.past_key_values
        later = model(input_ids=turn, past_key_values=cache).logits
    assert difference(torch.cat([out.logits[:, -1:], later[:, :-1]], dim=1), expected) < TOLERANCE
    with pytest.raises(ModaValueError, match="images in a call on a cache of 13 tokens"):
        model(**x, past_key_values=cache)
