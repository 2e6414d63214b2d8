"""Logits of the original LLaVA and Cambrian-1 code by several ways that must agree, and which of it there is here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legacy_models
import moda_attn
from legacy_models import CODES
from legacy_standins import IGNORED
from moda_attn import ModaConfig
from perturb import randomise

ALIGN_ONLY = ModaConfig(mask="none", location_prior=False)
#: Allowed difference of float32 logits that are of size 1.
TOLERANCE = 1e-5
PADS = ("left", "right")
#: Every row with one image at the same place, as Cambrian wants them.
ROWS = ["TITT", "TITTTTT", "TIT"]
MISSING = {name: reason for name, code in CODES.items() if (reason := code.missing()) is not None}


@pytest.fixture(params=[name for name in CODES if name not in MISSING])
def available(request: pytest.FixtureRequest) -> str:
    """The name of a code base that can be built here; each in turn."""
    return request.param


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
