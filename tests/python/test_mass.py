"""Attention mass by key modality: what it adds up to, and that it is the mass by relation in detail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moda_attn import functional as F
from moda_attn import reference
from problems import DTYPES, Case, attention_problem
from tolerance import verdict

CASE = Case(length=333, batch=2, heads=4, kv_heads=2, dim=24, modalities=3, padding="left", sink="plain", bias="plain")
CASES = {
    "joint": CASE,
    "split": replace(CASE, combine="split"),
    "interleaved": replace(CASE, image="interleaved", sink="none", bias="none"),
    "windows": replace(CASE, ranges="window", sink="extreme", bias="forbidding"),
    "few queries": replace(CASE, rows=3, own_query_modality=True),
    "one modality": replace(CASE, modalities=1, image="absent", bias="none"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mass_by_modality_is_mass_by_relation_in_detail(name: str, dtype: torch.dtype):
    problem = attention_problem(CASES[name], dtype)
    out, by_relation = F.modular_attention(**problem, return_mass=True)
    same_out, by_modality = F.modular_attention(**problem, return_mass="modality")
    if name == "few queries":
        # Mass by modality goes through tiles however few the queries are, which rounds otherwise.
        assert verdict(same_out, out, name="out")
    else:
        assert torch.equal(out, same_out)
    modalities = CASES[name].modalities
    assert by_modality.shape == (*out.shape[:3], modalities + 1)
    rows, n = problem["query_modality"], CASES[name].queries
    own = (problem["modality"][:, -n:] if rows is None else rows).long()
    one_hot = (own[:, None, :, None] == torch.arange(modalities)).to(by_modality.dtype)
    keys = by_modality[..., :-1]
    on_self = (keys * one_hot).sum(-1)
    added = torch.stack([on_self, keys.sum(-1) - on_self, by_modality[..., -1]], -1)
    torch.testing.assert_close(added, by_relation, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)
    if CASES[name].combine == "joint":
        seen = by_modality.sum(-1)
        assert torch.all((seen - 1).abs().minimum(seen.abs()) < 1e-5)


def test_every_modality_has_its_column_whether_it_occurs_or_not():
    query, ids = torch.randn(1, 2, 40, 8), torch.tensor([0, 3]).repeat(20)[None]
    _, mass = F.modular_attention(query, query, query, ids, num_modalities=6, return_mass="modality")
    assert mass.shape == (1, 2, 40, 7)
    assert not mass[..., [1, 2, 4, 5, 6]].any()
    wanted = reference.modular_attention(query, query, query, ids, num_modalities=6, return_mass="modality")[1]
    torch.testing.assert_close(mass, wanted)


def test_the_table_says_how_many_modalities_there_are():
    query, ids = torch.randn(1, 2, 9, 8), torch.zeros(1, 9, dtype=torch.long)
    _, mass = F.modular_attention(
        query, query, query, ids, modality_bias=torch.zeros(1, 1, 4, 4), return_mass="modality"
    )
    assert mass.shape == (1, 2, 9, 5)
    assert not mass.requires_grad
