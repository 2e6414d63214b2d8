"""ModaConfig: presets, the dictionary round trip, and every value or combination that must be refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moda_attn import ModaConfig
from moda_attn.errors import ModaValueError


@pytest.mark.parametrize(
    "config",
    [
        ModaConfig(),
        ModaConfig.paper(),
        ModaConfig.released(),
        ModaConfig(num_modalities=5, align=(4, "audio"), fuser_rank=3, layers=(0, 7), mask="learned", combine="split"),
        ModaConfig(decay=0.25, base=0, span=77, aligner="mlp"),
    ],
)
def test_round_trip_through_json(config: ModaConfig):
    assert ModaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets():
    assert ModaConfig.paper() == ModaConfig(base=0.0)
    released = ModaConfig.released()
    assert (released.align, released.basis, released.fusion) == (("vision",), "covariance", "gated")
    assert (released.context, released.mask, released.location_prior) == ("all", "none", False)
    assert not released.changes_attention
    assert ModaConfig().changes_attention


def test_it_is_frozen_and_hashable():
    config = ModaConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mask = "none"
    assert hash(config) == hash(ModaConfig())


def test_lists_become_tuples():
    assert ModaConfig(align=["vision"], layers=[2, 0]) == ModaConfig(align=("vision",), layers=(2, 0))
    assert ModaConfig(layers=[2, 0]).layer_indices(3) == (0, 2)
    assert ModaConfig().layer_indices(3) == (0, 1, 2)


def test_align_ids():
    assert ModaConfig(num_modalities=4, align=("audio", "text")).align_ids == (0, 3)
    assert ModaConfig(fusion="original").align_ids == ()
    assert ModaConfig(align=()).align_ids == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_modalities": 0}, "num_modalities = 0; wanted a whole number"),
        ({"num_modalities": 2.0}, "num_modalities = 2.0"),
        ({"num_modalities": True}, "num_modalities = True"),
        ({"align": ("sound",)}, "align = "),
        ({"align": ("audio",)}, "ids below 2"),
        ({"align": (2,)}, "ids below 2"),
        ({"align": "vision"}, "align = 'vision'; wanted a tuple"),
        ({"align": ("vision", 1)}, "names a modality twice"),
        ({"basis": "correlation"}, "basis = 'correlation'; wanted one of 'covariance', 'gram'"),
        ({"aligner": "mlp3"}, "aligner = 'mlp3'"),
        ({"fusion": "cross"}, "fusion = 'cross'"),
        ({"mask": None}, "mask = None"),
        ({"combine": "sum"}, "combine = 'sum'"),
        ({"context": "answer"}, "context = 'answer'"),
        ({"fuser_rank": 0}, "fuser_rank = 0"),
        ({"span": -1}, "span = -1"),
        ({"decay": "fast"}, "decay = 'fast'; wanted a finite number"),
        ({"decay": float("nan")}, "decay = nan"),
        ({"base": float("inf")}, "base = inf"),
        ({"location_prior": 1}, "location_prior = 1; wanted True or False"),
        ({"layers": "first"}, "layers = 'first'"),
        ({"layers": ()}, "at least one"),
        ({"layers": (-1,)}, r"layers = \(-1,\)"),
        ({"layers": (1, 1)}, "distinct"),
        ({"num_modalities": 1, "align": ("text",)}, "no other modality"),
        ({"num_modalities": 1, "align": ()}, "no other modality"),
        ({"fuser_rank": 4, "fusion": "gated"}, 'fuser_rank = 4 needs fusion = "concat"'),
        ({"fuser_rank": 4, "align": ()}, "fuser_rank = 4 needs"),
        ({"decay": 0.1, "mask": "fixed"}, "decay = 0.1 has no use"),
        ({"base": -2.0, "mask": "learned"}, "base = -2.0 has no use"),
        ({"aligner": "mlp", "fusion": "original"}, "nothing to align"),
        ({"colour": "red", "mask": "none"}, r"unknown fields \['colour'\]; known are"),
    ],
)
def test_what_is_refused(fields: dict, message: str):
    with pytest.raises(ModaValueError, match=message):
        ModaConfig.from_dict(fields)


def test_layers_beyond_the_model():
    with pytest.raises(ModaValueError, match="the model has 4 layers"):
        ModaConfig(layers=(1, 4)).layer_indices(4)
