"""Logits of a patched model by several ways that must agree: one forward, decoding by hand, `generate`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moda_attn
import tiny
from moda_attn import ModaConfig

#: Allowed difference of float32 logits that are of size 1.
TOLERANCE = 1e-5


def patched(family: str = "llava-llama", config: ModaConfig | None = None, **options) -> nn.Module:
    model = tiny.build(family)
    moda_attn.apply(model, config, **options)
    tiny.randomise(model)
    return model


def one_shot(model: nn.Module, x: dict[str, Tensor], continuation: Tensor) -> Tensor:
    """Logits that predict each continuation token, from one forward over prompt and continuation, as in training."""
    ids = torch.cat([x["input_ids"], continuation], dim=1)
    labels = torch.cat([torch.full_like(x["input_ids"], -100), continuation], dim=1)
    mask = torch.cat([x["attention_mask"], torch.ones_like(continuation)], dim=1)
    with torch.no_grad():
        out = model(**(x | {"input_ids": ids, "attention_mask": mask}), labels=labels)
    return out.logits[:, x["input_ids"].shape[1] - 1 : -1]


def step_by_step(model: nn.Module, x: dict[str, Tensor], continuation: Tensor) -> Tensor:
    """The same logits by hand-made decoding: a prefill, then one token at a time."""
    mask, rows = x["attention_mask"], []
    with torch.no_grad():
        out = model(**x, use_cache=True)
        for token in continuation.unbind(1):
            rows.append(out.logits[:, -1])
            mask = torch.cat([mask, torch.ones_like(token[:, None])], dim=1)
            out = model(input_ids=token[:, None], attention_mask=mask, past_key_values=out.past_key_values)
    return torch.stack(rows, dim=1)


def generated(model: nn.Module, x: dict[str, Tensor], steps: int = 6, **options) -> tuple[Tensor, Tensor]:
    """Greedy continuation and the logits it was chosen from."""
    out = model.generate(
        **x,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        # A one-shot forward would take a generated placeholder for an image's.
        suppress_tokens=[tiny.IMAGE],
        **options,
    )
    return out.sequences[:, x["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
