"""Memory layouts and what holds nothing: broadcast, negated and empty tensors, padding, upstream gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moda_attn import functional as F
from parity import evaluate
from problems import Case, align_problem, attention_problem

CASE = Case(length=9, batch=2, heads=4, kv_heads=2, dim=8, modalities=3, image="interleaved", padding="left")


def test_broadcast_views_give_the_same_result():
    query = torch.randn(1, 1, 1, 8).expand(2, 4, 9, 8)
    key, value = torch.randn(1, 2, 9, 8).expand(2, 2, 9, 8), torch.randn(2, 2, 9, 1).expand(2, 2, 9, 8)
    ids = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1, 1]], dtype=torch.int32).expand(2, 9)
    views = (query, key, value, ids)
    assert torch.equal(F.modular_attention(*views), F.modular_attention(*(view.clone() for view in views)))
    tables = [torch.eye(8).expand(2, 8, 8), torch.randn(1, 1, 8).expand(2, 8, 8)]
    aligned, basis = F.duplex_align(key, value, ids, *tables)
    copied, copied_basis = F.duplex_align(key.clone(), value.clone(), ids.clone(), *(t.clone() for t in tables))
    assert torch.equal(aligned, copied)
    assert torch.equal(basis, copied_basis)


def test_an_expanded_upstream_gradient_is_read_as_it_lies():
    x = attention_problem(CASE, torch.float32)
    x["query"].requires_grad_()
    F.modular_attention(**x).sum().backward()
    expanded = x["query"].grad.clone()
    x["query"].grad = None
    out = F.modular_attention(**x)
    out.backward(torch.ones_like(out))
    assert torch.equal(x["query"].grad, expanded)


def test_a_negated_view_is_not_read_as_it_lies():
    """The neg bit of torch is invisible to DLPack: dispatch must resolve it before the kernel reads."""
    pairs = torch.randn(2, 4, 9, 8, dtype=torch.complex64)
    negated = torch.conj(pairs).imag
    assert negated.is_neg()
    x = attention_problem(CASE, torch.float32)
    plain = torch.empty(2, 4, 9, 8).copy_(negated)
    assert torch.equal(F.modular_attention(**{**x, "query": negated}), F.modular_attention(**{**x, "query": plain}))


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "heads"])
@pytest.mark.parametrize("combine", ["joint", "split"])
def test_empty_tensors(empty: str, combine: str):
    b, hq, hkv, nq, nk = 2, 4, 2, 3, 5
    b, nq, nk = (0 if empty == name else size for name, size in (("batch", b), ("queries", nq), ("keys", nk)))
    hq, hkv = (0, 0) if empty == "heads" else (hq, hkv)
    query = torch.randn(b, hq, nq, 8, requires_grad=True)
    key, value = (torch.randn(b, hkv, nk, 8, requires_grad=True) for _ in range(2))
    ids, query_ids = torch.zeros(b, nk, dtype=torch.long), torch.zeros(b, nq, dtype=torch.long)
    options = {"query_modality": query_ids, "combine": combine, "return_mass": True}
    out, mass = F.modular_attention(query, key, value, ids, **options)
    assert (out.shape, mass.shape) == ((b, hq, nq, 8), (b, hq, nq, 3))
    assert not out.any()
    assert not mass.any()
    out.sum().backward()
    for leaf in (query, key, value):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
    eye = torch.eye(8).expand(2, 8, 8)
    aligned, basis = F.duplex_align(key, value, ids, eye, eye)
    assert (aligned.shape, basis.shape) == (key.shape, (b, hkv, 2, 8, 8))
    assert basis.any() == (empty == "queries")
    rates = torch.ones(2, hq)
    assert F.pseudo_sink(query_ids, query_ids, 9, rates, rates).shape == (b, hq, nq)


@pytest.mark.parametrize("combine", ["joint", "split"])
@pytest.mark.parametrize("poison", [torch.nan, 3e38])
def test_what_padding_holds_reaches_nothing(combine: str, poison: float):
    x = attention_problem(replace(CASE, combine=combine), torch.float32)
    hidden = (x["modality"] < 0)[:, None, :, None]
    for operator, inputs, names in (
        (F.modular_attention, x, ("query", "key", "value")),
        (F.duplex_align, align_problem(CASE, torch.float32), ("key", "value")),
    ):
        dirty, clean = (
            evaluate(operator, inputs | {name: inputs[name].masked_fill(hidden, filling) for name in names})[0]
            for filling in (poison, 0)
        )
        # Alignment passes padding keys through as they are.
        for results in (dirty, clean):
            results["output 0"].masked_fill_(hidden, 0)
        assert all(torch.equal(tensor, clean[name]) for name, tensor in dirty.items())
