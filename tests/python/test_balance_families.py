"""Attention masses, and what every token receives, against the attention maps of the model's own eager attention."""

from __future__ import annotations

import pytest
import torch

import matrix
import tiny
from moda_attn.analysis import attention_balance, received_attention
from moda_attn.config import TEXT, VISION

#: Of float64 models; some of them compute their softmax or their positions in float32.
TOLERANCE = 1e-5


def double(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in x.items()}


def eager_maps(model: torch.nn.Module, x: dict[str, torch.Tensor], layers: tuple[int, ...]) -> list[torch.Tensor]:
    """(B, Hq, N, N) of each layer."""
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = model(**x, output_attentions=True).attentions
    return [maps[layer] for layer in layers]


@pytest.mark.parametrize("family", tiny.ALL)
def test_masses_are_those_of_eager_attention(family: str):
    model = tiny.build(family, torch.float64)
    # Of a row that sees nothing eager attention in float64 makes NaN, and of all others in the next layer: padding is
    # on the right, and shorter than a window.
    x = double(tiny.inputs(family, ["TTITTTTT", "TITITT"], pad="right"))
    x |= matrix.positions(model, x)
    labels = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    report = attention_balance(model, **x, labels=labels)
    received = received_attention(model, **x, labels=labels)
    assert report.layers == received.layers
    kinds = torch.from_numpy(received.modality)
    assert torch.equal(kinds, tiny.modality(family, x).clamp(max=1).masked_fill(x["attention_mask"] == 0, -1))
    predicting = torch.zeros_like(labels, dtype=torch.bool)
    predicting[:, :-1] = labels[:, 1:] != -100
    for layer, weights in enumerate(eager_maps(model, x, report.layers)):
        for balance in (*report.modalities, *report.answers):
            rows = (kinds == balance.modality) & (predicting | (not balance.answers_only))
            chosen = weights.transpose(1, 2)[rows]
            keys = [kinds[:, None, None] == modality for modality in (TEXT, VISION)]
            expected = torch.stack([(weights * key).sum(-1).transpose(1, 2)[rows].mean(0) for key in keys], -1)
            assert len(chosen) == balance.rows
            assert abs(torch.from_numpy(balance.mass[layer, :, :2]) - expected).max() < TOLERANCE
            by_row = (weights.mean(1) * rows[..., None]).sum(1) / rows.sum(-1, keepdim=True)
            given = torch.from_numpy(received.of(balance.modality, answers_only=balance.answers_only)[layer])
            assert torch.equal(given.isnan(), by_row.isnan())
            assert (given - by_row).nan_to_num().abs().max() < TOLERANCE
