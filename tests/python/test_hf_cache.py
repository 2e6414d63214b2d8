"""Every kind of cache, windows and blocks that see both ways: step by step against eager attention and one forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import causal_mask_function

import matrix
import moda_attn
import tiny
from decoding import TOLERANCE, difference, generated, patched
from moda_attn.errors import ModaRuntimeError, ModaValueError
from moda_attn.hf import interface

#: Text decoders with windows of 6 keys, blocks that see both ways, or both.
PATTERNS = ("mistral window", "aya-vision", "gemma3", "paligemma")
ROWS = ["TTITTT", "TITTTTTTTTTT"]  # One image each: some releases of transformers mix up the images of beams.
STEPS = 9


def build(pattern: str) -> nn.Module:
    model = tiny.build("llava-mistral" if pattern == "mistral window" else pattern)
    if pattern == "mistral window":
        text = model.config.text_config
        text.sliding_window = 6
        for layer in model.model.language_model.layers:
            layer.self_attn.sliding_window = 6
    return model


def inputs(pattern: str) -> dict[str, Tensor]:
    return tiny.inputs("llava-mistral" if pattern == "mistral window" else pattern, ROWS)


def caches(model: nn.Module) -> dict[str, object]:
    text = model.config.get_text_config()
    return {
        "dynamic": DynamicCache(config=text),
        "never sliding": DynamicCache(),
        "static": StaticCache(config=text, max_cache_len=40),
    }


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cache", ["default", "dynamic", "never sliding", "static", "none"])
def test_generation_equals_eager_attention(pattern: str, cache: str):
    """With nothing learned yet our kernel gives what torch's eager attention gives, beyond the window too."""
    x = inputs(pattern)
    options = {"use_cache": False} if cache == "none" else {}
    steps = {}
    for attention in ("eager", "moda"):
        model = build(pattern)
        if attention == "eager":
            model.set_attn_implementation("eager")
        else:
            moda_attn.apply(model, matrix.ALIGN_ONLY, attention="moda")
        if cache in caches(model):
            options["past_key_values"] = caches(model)[cache]
        tokens, steps[attention] = matrix.generated(model, x, STEPS, **options)
    assert tokens.shape[1] == STEPS
    assert difference(steps["moda"], steps["eager"]) < 1e-6 * max(100, steps["eager"].abs().max())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cache", ["default", "never sliding", "static"])
def test_generation_equals_one_forward_beyond_the_window(pattern: str, cache: str):
    """With everything learned: bases, pseudo-scores and prior."""
    if (pattern, cache) == ("paligemma", "static") and tiny.RELEASE < (5, 0):
        pytest.skip("in this release PaliGemma's own mask is another one with a static cache")
    x, model = inputs(pattern), build(pattern)
    moda_attn.apply(model)
    tiny.randomise(model)
    options = {} if cache == "default" else {"past_key_values": caches(model)[cache]}
    tokens, steps = matrix.generated(model, x, STEPS, **options)
    expected = matrix.one_shot(model, x, tokens)
    assert difference(steps, expected) < matrix.TOLERANCE
    moda_attn.remove(model)
    assert difference(steps, matrix.one_shot(model, x, tokens)) > 0.1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_that_is_lost_would_be_noticed(pattern: str, monkeypatch: pytest.MonkeyPatch):
    """Negative control: plain causal attention in its place."""
    if pattern == "paligemma" and tiny.RELEASE < (5, 0):
        pytest.skip("in this release PaliGemma makes its mask itself, not by the mask interface")
    x, model = inputs(pattern), build(pattern)
    moda_attn.apply(model, matrix.ALIGN_ONLY, attention="moda")
    tokens, steps = matrix.generated(model, x, STEPS)
    right = interface.key_range
    monkeypatch.setattr(interface, "window_of", lambda function: 10**9)
    monkeypatch.setattr(interface, "key_range", lambda function, *args, **kw: right(causal_mask_function, *args, **kw))
    expected = matrix.one_shot(model, x, tokens)
    assert difference(steps, expected) > 0.1


@pytest.mark.parametrize("pattern", ["mistral window", "gemma3"])
def test_assisted_decoding_rolls_a_sliding_cache_back(pattern: str):
    x, model = inputs(pattern), build(pattern)
    x = tiny.inputs("llava-mistral" if pattern == "mistral window" else pattern, ROWS[1])
    moda_attn.apply(model)
    tiny.randomise(model)
    tokens, steps = matrix.generated(model, x, STEPS)
    again, other = matrix.generated(model, x, STEPS, assistant_model=build(pattern))
    assert torch.equal(tokens, again)
    assert difference(steps, other) < matrix.TOLERANCE


@pytest.mark.parametrize("pattern", ["mistral window", "gemma3"])
def test_beams_over_a_sliding_cache(pattern: str):
    x, model = inputs(pattern), build(pattern)
    moda_attn.apply(model)
    tiny.randomise(model)
    out = model.generate(
        **x,
        max_new_tokens=STEPS,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
        suppress_tokens=list(range(tiny.TEXT_END, tiny.VOCABULARY)),
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, x["input_ids"].shape[1] :]
    chosen = matrix.one_shot(model, x, tokens).log_softmax(-1).gather(-1, tokens[..., None])
    assert difference(chosen.sum((1, 2)), out.sequences_scores) < 1e-3


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_may_be_longer_than_what_a_cache_holds(kind: str):
    """As for a static cache, whose mask need not grow: the columns of tokens to come say nothing."""
    model, x = patched(), tiny.inputs("llava-llama", ROWS)
    token = torch.tensor([[5], [6]])
    logits = []
    for extra in (0, 7):
        cache = caches(model)[kind]
        with torch.no_grad():
            model(**x, past_key_values=cache)
            mask = torch.nn.functional.pad(x["attention_mask"], (0, 1), value=1)
            mask = torch.nn.functional.pad(mask, (0, extra))
            logits.append(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
    assert difference(*logits) == 0
    with pytest.raises(ModaValueError, match="1 new tokens after 16 in the cache"):
        model(input_ids=token, attention_mask=x["attention_mask"], past_key_values=cache)


def test_several_turns_on_one_cache():
    """A later turn is aligned with the first prompt's bases: as one forward over all of it with that context."""
    model, x = patched(), tiny.inputs("llava-llama", ROWS)
    cache = caches(model)["dynamic"]
    first, _ = generated(model, x, past_key_values=cache)
    question = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    later = {
        "input_ids": torch.cat([x["input_ids"], first, question], dim=1),
        "attention_mask": torch.nn.functional.pad(x["attention_mask"], (0, first.shape[1] + 4), value=1),
    }
    tokens, steps = generated(model, later, past_key_values=cache)
    images = {"pixel_values": x["pixel_values"]}
    context = torch.arange(later["input_ids"].shape[1])[None].expand(2, -1) < x["input_ids"].shape[1]

    # Without the cache the context must be given; else the whole conversation is the prompt.
    again, anew = generated(model, later | images, moda_context=context)
    assert torch.equal(tokens, again)
    assert difference(steps, anew) < TOLERANCE
    _, other = generated(model, later | images)
    assert difference(steps, other) > 0.01

    ids = torch.cat([later["input_ids"], tokens], dim=1)
    mask = torch.nn.functional.pad(later["attention_mask"], (0, tokens.shape[1]), value=1)
    with torch.no_grad():
        whole = model(
            **images,
            input_ids=ids,
            attention_mask=mask,
            moda_context=torch.nn.functional.pad(context, (0, tokens.shape[1])),
        ).logits
    assert difference(whole[:, later["input_ids"].shape[1] - 1 : -1], steps) < TOLERANCE

    for kind in ("dynamic", "static"):
        filled = caches(model)[kind]
        with torch.no_grad():
            model(**x, past_key_values=filled)
        with pytest.raises(ModaValueError, match="images in a call on a cache of 15 tokens"):
            model(**x, past_key_values=filled)
    with pytest.raises(ModaValueError, match="describe a prompt; past_key_values holds one already"):
        generated(model, later, past_key_values=cache, moda_context=context)


def test_a_prompt_prefilled_once_serves_several_answers():
    """A copy of a filled cache has its own state."""
    model, x = patched(), tiny.inputs("llava-llama", ROWS)
    cache = caches(model)["dynamic"]
    with torch.no_grad():
        model(**x, past_key_values=cache)
    for question in (torch.tensor([[7, 8], [9, 10]]), torch.tensor([[11, 12], [13, 14]])):
        whole = {
            "input_ids": torch.cat([x["input_ids"], question], dim=1),
            "attention_mask": torch.nn.functional.pad(x["attention_mask"], (0, 2), value=1),
        }
        tokens, steps = generated(model, whole, past_key_values=copy.deepcopy(cache))
        context = torch.arange(17)[None].expand(2, -1) < 15
        again, other = generated(model, whole | {"pixel_values": x["pixel_values"]}, moda_context=context)
        assert torch.equal(tokens, again)
        assert difference(steps, other) < TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_is_as_good_as_new(kind: str):
    model, x = patched(), tiny.inputs("llava-llama", ROWS)
    cache = caches(model)[kind]
    token = torch.tensor([[5], [6]])
    logits = []
    with torch.no_grad():
        model(**x, past_key_values=cache)
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("in this release of transformers a dynamic cache keeps its length through reset")
        for prompt in (x, {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}, x):
            model(**prompt, past_key_values=cache)
            logits.append(model(input_ids=token, past_key_values=cache).logits)
            cache.reset()
    assert torch.equal(logits[0], logits[2])


def test_caches_filled_by_another_model_are_refused():
    model, x = tiny.build(), tiny.inputs("llava-llama", ROWS)
    filled = caches(model)
    with torch.no_grad():
        for cache in filled.values():
            model(**x, past_key_values=cache)
    moda_attn.apply(model)
    for cache in filled.values():
        with pytest.raises(ModaRuntimeError, match="holds 15 keys that this patched model did not put there"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


def test_masks_of_the_callers_own():
    """Dense ones of one interval a query are as good as intervals; others are refused."""
    model, x = patched(), tiny.inputs("llava-llama", ROWS[:1])
    length = x["input_ids"].shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    positions = {"position_ids": torch.arange(length)[None]}

    def logits(mask: Tensor) -> Tensor:
        return matrix.logits(model, x | positions | {"attention_mask": mask})

    expected = matrix.logits(model, x)
    assert difference(logits(causal), expected) < TOLERANCE
    assert difference(logits(torch.where(causal, 0.0, torch.finfo(torch.float32).min)), expected) < TOLERANCE
    assert difference(logits(causal.triu(-3)), expected) > 0.1
    holes = causal.clone()
    holes[..., 5:, 3] = False
    for mask, message in (
        (holes, "sees keys before and after one"),
        (causal.expand(1, 4, -1, -1), "for every head"),
        (torch.where(causal, -0.5, torch.finfo(torch.float32).min), "adds to scores"),
    ):
        with pytest.raises(ModaValueError, match=message):
            logits(mask)
