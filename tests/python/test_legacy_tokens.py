"""The original LLaVA and Cambrian-1 code: which token of a merged sequence is what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import legacy_models
from legacy_decoding import (
    PADS,
    ROWS,
    available,
    logits,
    patched,
)
from legacy_models import CODES
from legacy_standins import IGNORED
from moda_attn.hf import record_mass

name = available


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
