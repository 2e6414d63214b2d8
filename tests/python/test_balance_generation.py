"""Attention over a generation: what every token looked at, against one dense forward over prompt and answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import matrix
import tiny
from moda_attn import ModaConfig
from moda_attn.analysis import GenerationBalance, generation_balance
from moda_attn.errors import ModaRuntimeError, ModaValueError
from moda_attn.hf.patch import runtime_of

STEPS = 5
#: Generated placeholders would be an image's in the forward that the test compares with.
PLAIN = {"do_sample": False, "suppress_tokens": list(range(tiny.TEXT_END, tiny.VOCABULARY))}


def dense(model: nn.Module, x: dict[str, Tensor], tokens: Tensor) -> np.ndarray:
    """(L, B, T, text, vision, generated) of the rows that chose `tokens`, from the attention maps of one forward."""
    whole = matrix.continued(x, tokens)
    whole["labels"] = torch.cat([torch.full_like(x["input_ids"], -100), tokens], dim=1)
    if runtime_of(model) is None:
        whole |= matrix.positions(model, whole)
        model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = model(**whole, output_attentions=True).attentions
    prompt, image = x["input_ids"].shape[1], whole["input_ids"] == tiny.IMAGE
    new = torch.arange(image.shape[1]) >= prompt
    groups = torch.stack([~image & ~new, image, new.expand_as(image)], dim=-1).float()
    rows = [(weights @ groups[:, None]).mean(1)[:, prompt - 1 : -1] for weights in maps]
    return torch.stack(rows).numpy()


def difference(found: GenerationBalance, expected: np.ndarray) -> float:
    return float(np.abs(found.mass[..., [0, 1, -2]] - expected).max())


@pytest.mark.parametrize("family", ["llava-llama", "llava-next-mistral", "qwen2-vl", "gemma3"])
@pytest.mark.parametrize(
    "config", [None, ModaConfig(), ModaConfig(combine="split")], ids=["unpatched", "joint", "split"]
)
def test_masses_are_those_of_one_dense_forward(family: str, config: ModaConfig | None):
    x = tiny.inputs(family, matrix.ROWS)
    model = tiny.build(family) if config is None else matrix.patched(family, config)
    found = generation_balance(model, **x, max_new_tokens=STEPS, **PLAIN)
    assert (runtime_of(model) is None) == (config is None)
    assert found.patched == (config is not None)
    assert found.layers == (0, 1, 2)
    assert found.columns == ("text", "vision", "generated", "pseudo")
    assert found.mass.shape == (3, 2, STEPS, 4)
    tokens, _ = matrix.generated(model, x, STEPS)
    assert np.array_equal(found.tokens, tokens.numpy())
    assert difference(found, dense(model, x, tokens)) < 1e-4
    assert not found.on_generated[:, :, 0].any()
    assert found.on_generated[:, :, 1:].min() > 0
    assert found.on_image.max() > 0.01
    if config is None or config.combine == "joint":
        assert np.abs(found.mass.sum(-1) - 1).max() < 1e-5
        assert (found.mass[..., -1] > 0).all() == (config is not None)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_the_kind_of_cache_makes_no_difference(options: dict):
    model, x = matrix.patched("llava-llama", ModaConfig()), tiny.inputs("llava-llama", matrix.ROWS)
    plain = generation_balance(model, **x, max_new_tokens=STEPS, **PLAIN)
    other = generation_balance(model, **x, max_new_tokens=STEPS, **PLAIN, **options)
    assert np.array_equal(plain.tokens, other.tokens)
    assert np.abs(plain.mass - other.mass).max() < 1e-4


@pytest.mark.parametrize("returned", [1, 2])
def test_beams_are_followed_back_to_the_prompt(returned: int):
    model, x = matrix.patched("llava-llama", ModaConfig()), tiny.inputs("llava-llama", ["TTITTT", "TTTITT"])
    beams = {"num_beams": 3, "num_return_sequences": returned}
    found = generation_balance(model, **x, max_new_tokens=STEPS, **PLAIN, **beams)
    assert found.tokens.shape == (2 * returned, STEPS)
    # The pixels of each image as often as its row.
    again = {name: tensor.repeat_interleave(returned, dim=0) for name, tensor in x.items()}
    assert difference(found, dense(model, again, torch.from_numpy(found.tokens))) < 1e-4


def test_a_row_ends_where_its_answer_does():
    model, x = tiny.build(), tiny.inputs("llava-llama", matrix.ROWS)
    whole = generation_balance(model, **x, max_new_tokens=STEPS, **PLAIN)
    end = int(whole.tokens[0, 2])
    found = generation_balance(model, **x, max_new_tokens=STEPS, **PLAIN, eos_token_id=end)
    first = [list(row).index(end) if end in row else STEPS for row in whole.tokens]
    for row, last in enumerate(first):
        assert np.array_equal(found.tokens[row, : last + 1], whole.tokens[row, : last + 1])
        assert (found.tokens[row, last + 1 :] == -1).all()
        assert np.isnan(found.mass[:, row, last + 1 :]).all()
        assert not np.isnan(found.mass[:, row, : last + 1]).any()
    assert '"generated"' in found.to_json()


def test_what_tries_several_tokens_at_once_is_refused():
    model, x = tiny.build(), tiny.inputs("llava-llama", "TTITTT")
    with pytest.raises(ModaValueError, match="prompt_lookup_num_tokens has the model look at several tokens"):
        generation_balance(model, **x, max_new_tokens=STEPS, prompt_lookup_num_tokens=2)


def test_a_model_that_is_called_otherwise_raises(monkeypatch: pytest.MonkeyPatch):
    model, x = tiny.build(), tiny.inputs("llava-llama", "TTITTT")

    def twice(self: nn.Module, ids: Tensor, **arguments) -> None:
        for _ in range(2):
            self(**x)

    monkeypatch.setattr(type(model), "generate", twice)
    with pytest.raises(ModaRuntimeError, match="once for each token"):
        generation_balance(model, **x, max_new_tokens=STEPS)
