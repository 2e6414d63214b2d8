"""Compiled decoding over a static cache: the same logits, no graph breaks, and nothing compiled again.

torch compiles a hook and the forward it stands before as a graph each: two in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import moda_attn
import tiny
from decoding import TOLERANCE, difference, patched
from moda_attn import ModaConfig

ROWS = ["TTITTT", "TITTTTITT"]
CONFIGS = {"default": ModaConfig(), "split": ModaConfig(combine="split", mask="learned"), "align": None}


class Graphs:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __deepcopy__(self, memo: dict) -> Graphs:
        return self  # transformers copies what it is configured with

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(model: nn.Module, step: Callable[..., Any], tokens: Tensor, rows: list[str]) -> Tensor:
    """Logits of every step; the steps after the prefill go through `step`, with a mask as long as the cache."""
    x = tiny.inputs("llava-llama", rows)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
    mask = torch.nn.functional.pad(x["attention_mask"], (0, 32 - x["attention_mask"].shape[1]), value=1)
    logits = []
    with torch.no_grad():
        out = model(**x, past_key_values=cache)
        for count, token in enumerate(tokens.unbind(1)):
            logits.append(out.logits[:, -1])
            position = x["attention_mask"].sum(-1, keepdim=True) + count
            out = step(input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache)
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_graphs_serve_every_step(config: ModaConfig | None):
    model = patched(config=config or ModaConfig(mask="none", location_prior=False))
    tokens = torch.randint(2, tiny.TEXT_END, (2, 6))
    expected = decode(model, model, tokens, ROWS)
    graphs = Graphs()
    step = torch.compile(model.__call__, fullgraph=True, backend=graphs)
    assert difference(decode(model, step, tokens, ROWS), expected) < TOLERANCE
    # Another prompt of another length, another cache: the same graphs again.
    for rows in (["TTITTT", "TTTITT"], ROWS):
        with torch.compiler.set_stance("fail_on_recompile"):
            again = decode(model, step, tokens, rows)
    assert graphs.count == 2
    assert difference(again, expected) < TOLERANCE


def test_the_graphs_use_the_basis():
    """Negative control: other bases, other logits, from the same graphs."""
    model = patched()
    tokens = torch.randint(2, tiny.TEXT_END, (2, 3))
    step = torch.compile(model.__call__, fullgraph=True, backend=Graphs())
    before = decode(model, step, tokens, ROWS)
    with torch.no_grad():
        for layer in moda_attn.hf.patch.moda_layers(model).values():
            layer.aligner.fuser.mix.zero_()
    assert difference(before[:, 1:], decode(model, step, tokens, ROWS)[:, 1:]) > 0.1


def test_generate_compiles_its_decoding():
    config = pytest.importorskip("transformers.generation.configuration_utils").CompileConfig
    model, graphs = patched(), Graphs()
    x = tiny.inputs("llava-llama", ROWS)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "suppress_tokens": [tiny.IMAGE],
    }
    expected = torch.stack(model.generate(**x, **options).logits, dim=1)
    compile_config = config(fullgraph=True, backend=graphs, mode=None)
    compile_config._compile_all_devices = True
    options |= {"cache_implementation": "static", "compile_config": compile_config}
    for _ in range(2):
        steps = torch.stack(model.generate(**x, **options).logits, dim=1)
        assert difference(steps, expected) < TOLERANCE
        assert graphs.count == 2
