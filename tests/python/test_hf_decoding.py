"""Ways to decode besides greedy: sampling, assistants, output_attentions, modality ids of the caller's own."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

import moda_attn
import tiny
from decoding import TOLERANCE, difference, generated, one_shot, patched
from moda_attn import ModaConfig
from moda_attn.errors import ModaTypeError, ModaValueError
from moda_attn.hf import record_mass, runtime
from tiny_checkpoint import make_checkpoint

#: Some releases cannot look up without an end token; this one is never chosen.
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": tiny.VOCABULARY}


class Recorder(LogitsProcessor):
    """Keeps the raw logits of every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores


def rows_of(x: dict[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """Every row and its images as often as `counts` say."""
    pick = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = (x["input_ids"] == tiny.IMAGE).sum(-1) // 4
    first = images.cumsum(0) - images
    result = {name: x[name][pick] for name in ("input_ids", "attention_mask")}
    features = [x["pixel_values"][first[row] : first[row] + images[row]] for row in pick]
    return result | {"pixel_values": torch.cat(features)}


def test_every_sample_of_a_prompt_keeps_its_own_state():
    model = patched()
    # One image each: some releases of transformers mix up the images of samples.
    x = tiny.inputs("llava-llama", ["TTITTT", "TITTTTTT"])
    recorder = Recorder()
    sequences = model.generate(
        **x,
        max_new_tokens=6,
        do_sample=True,
        temperature=4.0,
        num_return_sequences=3,
        suppress_tokens=[tiny.IMAGE],
        logits_processor=LogitsProcessorList([recorder]),
    )
    tokens = sequences[:, x["input_ids"].shape[1] :]
    assert len({tuple(row) for row in tokens.tolist()}) > 3
    steps = torch.stack(recorder.steps, dim=1)
    expected = one_shot(model, rows_of(x, [3, 3]), tokens)
    keep = torch.arange(tiny.VOCABULARY) != tiny.IMAGE
    assert difference(steps[..., keep], expected[..., keep]) < TOLERANCE


def assistants() -> dict[str, Callable[[], nn.Module]]:
    """The same model with noise, so that it drafts tokens of which some are taken: plain, and patched itself."""

    def noisy(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model.lm_head.weight.add_(0.2 * model.lm_head.weight.std() * torch.randn(model.lm_head.weight.shape))
        return model

    return {"plain": lambda: noisy(tiny.build()), "patched": lambda: noisy(patched())}


@pytest.mark.parametrize("kind", assistants())
def test_an_assistants_drafts_stay_out_of_the_basis(kind: str):
    model, assistant = patched(), assistants()[kind]()
    x = tiny.inputs("llava-llama", ["TTITTTTITTTTTT"])
    tokens, steps = generated(model, x, steps=12)
    again, other = generated(model, x, steps=12, assistant_model=assistant)
    assert torch.equal(tokens, again)
    assert difference(steps, other) < TOLERANCE


def repetitive(family: str = "llava-llama") -> dict[str, Tensor]:
    """A prompt whose end stood in it before, so that prompt lookup has drafts at the first step."""
    x = tiny.inputs(family, ["TTITTTTITTTTTT"])
    x["input_ids"][0, -6:] = torch.tensor([5, 6, 7, 8, 5, 6])
    return x


@pytest.mark.parametrize("family", ["llava-llama", "qwen2.5-vl", "glm4v"])  # these two have mm_token_type_ids
def test_prompt_lookup_keeps_drafts_out_of_the_basis(family: str):
    model, x = patched(family), repetitive(family)
    tokens, steps = generated(model, x)
    again, other = generated(model, x, **LOOKUP)
    assert torch.equal(tokens, again)
    assert difference(steps, other) < TOLERANCE


def test_drafts_in_the_basis_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: with the prompt's length unknown the first call's drafts feed the bases."""
    model, x = patched(), repetitive()
    _, steps = generated(model, x)
    monkeypatch.setattr(runtime.Prompt, "take", classmethod(lambda cls, args, kwargs: cls(None)))
    for options in (LOOKUP, {"assistant_model": tiny.build()}):
        _, other = generated(model, x, **options)
        assert difference(steps[:, 0], other[:, 0]) > 0.01


def test_attention_weights_on_request():
    """Those of torch's eager attention where nothing is learned yet; with pseudo-scores the rest of the mass."""
    x = tiny.inputs("llava-llama", ["TTITTT", "TITTTTITT"])
    real = x["attention_mask"].bool()
    position_ids = (x["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model = tiny.build()
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        expected = model(**x, output_attentions=True, position_ids=position_ids).attentions
        moda_attn.apply(model, ModaConfig(mask="none", location_prior=False), attention="moda")
        weights = model(**x, output_attentions=True).attentions
        for ours, theirs in zip(weights, expected, strict=True):
            assert difference(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real]) < TOLERANCE
        assert model(**x).attentions is None
        moda_attn.remove(model)
        moda_attn.apply(model)
        tiny.randomise(model)
        with record_mass(model) as recorder:
            weights = model(**x, output_attentions=True).attentions
    for layer, ours in enumerate(weights):
        on_keys = recorder.layers[layer][0].mass[..., :2].sum(-1)
        assert difference(ours.sum(-1), on_keys) < TOLERANCE
    out = model.generate(**x, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True, do_sample=False)
    assert [step[0].shape[-1] for step in out.attentions] == [15, 16]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "none", "beams"])
def test_generate_takes_the_callers_modality_ids(options: dict):
    """Given what the model would have read off itself they change nothing, embeddings merged by the caller included."""
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT", "TITTTTITT"])
    ids = (x["input_ids"] == tiny.IMAGE).long()
    tokens, steps = generated(model, x, **options)
    again, other = generated(model, x, modality_ids=ids, **options)
    assert torch.equal(tokens, again)
    assert difference(steps, other) == 0
    with torch.no_grad():
        embeds = model.get_input_embeddings()(x["input_ids"])
        features = model.model.get_image_features(x["pixel_values"])
        features = torch.cat(list(getattr(features, "pooler_output", features)))
        embeds[ids.bool()] = features
    merged = {"inputs_embeds": embeds, "attention_mask": x["attention_mask"]}
    if not options:
        out = model.generate(
            **merged,
            modality_ids=ids,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=[tiny.IMAGE],
        )
        assert difference(torch.stack(out.logits, dim=1), steps) < TOLERANCE
    with pytest.raises(ModaValueError, match="give modality_ids"):
        model.generate(**merged, max_new_tokens=2)
    _, changed = generated(model, x, modality_ids=1 - ids, **options)
    assert difference(changed[:, 0], steps[:, 0]) > 0.1


def test_words_about_a_prompt_that_do_not_fit():
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT"])
    ids = (x["input_ids"] == tiny.IMAGE).long()
    with pytest.raises(ModaValueError, match=r"modality_ids has shape \(1, 8\); wanted \(1, 9\), as the prompt"):
        model.generate(**x, modality_ids=ids[:, 1:], max_new_tokens=2)
    with pytest.raises(ModaTypeError, match="moda_context must be a torch"):
        model.generate(**x, moda_context=[True], max_new_tokens=2)


class Pause(LogitsProcessor):
    """Stops at its first step until `other` has come to its own, and then, if told so, until `other` is done."""

    def __init__(self) -> None:
        self.here, self.done, self.other, self.waits = threading.Event(), threading.Event(), None, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.here.is_set():
            self.here.set()
            assert self.other.here.wait(60)
            assert not self.waits or self.other.done.wait(60)
        return scores


def test_threads_do_not_mix_up_their_prompts():
    """A second thread is inside its first step while the first one goes on: without a cache each step asks anew."""
    model = patched()
    batches = [tiny.inputs("llava-llama", row) for row in ("TITTTTTT", "TIT")]
    alone = [generated(model, x, use_cache=False)[1] for x in batches]
    pauses = [Pause(), Pause()]
    pauses[0].other, pauses[1].other, pauses[1].waits = pauses[1], pauses[0], True

    def together(number: int) -> Tensor:
        if number:
            assert pauses[0].here.wait(60)
        options = {"use_cache": False, "logits_processor": LogitsProcessorList([pauses[number]])}
        try:
            return generated(model, batches[number], **options)[1]
        finally:
            pauses[number].done.set()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found, expected in zip(pool.map(together, range(2)), alone, strict=True):
            assert torch.equal(found, expected)


def test_a_refused_generate_leaves_nothing_behind():
    model, x = patched(), tiny.inputs("llava-llama", "TITTTTTT")
    expected = model(**x, use_cache=True)
    words = {"modality_ids": torch.zeros(1, 1, dtype=torch.long)}
    with pytest.raises(ModaValueError, match="past_key_values holds one already"):
        model.generate(torch.tensor([[5]]), past_key_values=expected.past_key_values, **words)
    assert torch.equal(model(**x).logits, expected.logits)


def test_a_call_beside_the_prompt_that_words_about_it_do_not_fit():
    model, x = patched(), tiny.inputs("llava-llama", "TITTT")
    words = {"modality_ids": (x["input_ids"] == tiny.IMAGE).long()}
    assert model.generate(**x, guidance_scale=2.0, max_new_tokens=2).shape[1] == x["input_ids"].shape[1] + 2
    with pytest.raises(ModaValueError, match=r"tokens of shape \(1, 1\), as it does for guidance_scale"):
        model.generate(**x, **words, guidance_scale=2.0, max_new_tokens=2)


def test_a_pipeline_takes_a_patched_model(tmp_path: Path):
    folder = make_checkpoint(tmp_path)
    model = hf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    moda_attn.apply(model)
    tiny.randomise(model, scale=3.0)
    picture, prompt = Image.open(folder / "picture.png").convert("RGB"), "<image> which digit is this ?"
    pipe = hf.pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 4, "do_sample": False}
    said = pipe(images=picture, text=prompt, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert said.split() == processor.decode(tokens, skip_special_tokens=True).split()


def test_continuous_batching_is_refused():
    """It cuts prompts into pieces and packs several into one row."""
    model = patched()
    for start in (model.init_continuous_batching, lambda: model.generate_batch([[1, 2, 3]])):
        with pytest.raises(ModaValueError, match="continuous batching"):
            start()
    moda_attn.remove(model)
    assert model.init_continuous_batching() is not None


def test_a_chunked_prefill():
    """Refused where the bases need the whole prompt at once; right where the configuration has no bases."""
    model = patched()
    x = tiny.inputs("llava-llama", ["TTITTT"])
    with pytest.raises(ModaValueError, match="prefill_chunk_size"):
        model.generate(**x, max_new_tokens=2, prefill_chunk_size=4)
    model = patched(config=ModaConfig(align=(), location_prior=False))
    x = tiny.inputs("llava-llama", ["TTTTTTTTT"])
    tokens, steps = generated(model, x)
    again, other = generated(model, x, prefill_chunk_size=4)
    assert torch.equal(tokens, again)
    assert difference(steps, other) < TOLERANCE
