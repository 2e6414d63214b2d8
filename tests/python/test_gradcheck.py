"""Gradients of the operators by finite differences, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moda_attn import functional as F
from problems import Case, align_problem, attention_problem, sink_problem

CASE = Case(length=9, batch=2, heads=2, kv_heads=1, dim=3, modalities=3, image="interleaved", padding="left")


def assert_gradients(
    operator: Any, problem: dict[str, Any], *names: str, result: int | None = None, **options: Any
) -> None:
    """Of one result of an operator, or of its only one, with respect to the arguments of these names."""

    def function(*leaves: Tensor) -> Tensor:
        out = operator(**problem | dict(zip(names, leaves, strict=True)), **options)
        out = out if result is None else out[result]
        return out.masked_fill(out.isinf(), 0)

    leaves = [problem[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=False)


@pytest.mark.parametrize("combine", ["joint", "split"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tables", "ranges"), [("shared", "any"), ("plain", "none")])
def test_attention(combine: str, causal: bool, tables: str, ranges: str):
    case = replace(CASE, combine=combine, is_causal=causal, sink=tables, bias=tables, ranges=ranges)
    problem = attention_problem(case, torch.float64)
    assert_gradients(F.modular_attention, problem, "query", "key", "value", "sink", "modality_bias")


@pytest.mark.parametrize("changes", [{}, {"scale": 0.7}, {"own_query_modality": True}], ids=str)
def test_attention_without_tables(changes: dict[str, Any]):
    case = replace(CASE, kv_heads=2, dim=2, sink="none", bias="none", **changes)
    assert_gradients(F.modular_attention, attention_problem(case, torch.float64), "query", "key", "value")


@pytest.mark.parametrize("kind", ["covariance", "gram"])
@pytest.mark.parametrize("context", ["all", "scattered"])
def test_alignment(kind: str, context: str):
    problem = align_problem(replace(CASE, kind=kind, context=context), torch.float64)
    for result in (0, 1):
        names = ("key", "value", "keep", "mix") if result == 0 else ("key", "value")
        assert_gradients(F.duplex_align, problem, *names, result=result, eps=1e-3)


def test_alignment_with_a_given_basis():
    problem = align_problem(replace(CASE, given_basis=True), torch.float64)
    assert_gradients(F.duplex_align, problem, "key", "keep", "mix", "basis", result=0)


def test_pseudo_sink():
    assert_gradients(F.pseudo_sink, sink_problem(CASE, torch.float64, span=7), "decay", "base")
