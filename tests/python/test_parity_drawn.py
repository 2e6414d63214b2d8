"""The operators against the dense float64 reference over their whole range: all dtypes, shapes, options and views."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import problems
from parity import check
from problems import Case, align_problem, attention_problem
from test_parity import DIMS, HEADS

LENGTHS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 65, 111, 127, 129, 255, 257, 511, 999, 1000, 1001, 1100)
# Bounds of one problem: entries of the dense score matrix, and multiplications of one of its products.
SCORES, PRODUCTS = 1_250_000, 80_000_000
SETTINGS = settings(
    derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck), database=None
)


@st.composite
def shapes(draw: st.DrawFn) -> Case:
    """What both operators share; the long problems have few heads, so that each stays affordable."""
    length = draw(st.one_of(st.sampled_from(LENGTHS), st.integers(1, 1100)))
    room = SCORES // length**2
    batch, heads = draw(st.sampled_from([(b, h) for b in (1, 2, 3) for h in HEADS if b * h[0] <= max(room, 1)]))
    products = length**2 * batch * heads[0]
    return Case(
        length=length,
        batch=batch,
        heads=heads[0],
        kv_heads=heads[1],
        dim=draw(st.sampled_from([d for d in DIMS if d * products <= PRODUCTS])),
        modalities=draw(st.integers(1, 4)),
        image=draw(st.sampled_from(problems.IMAGES)),
        padding=draw(st.sampled_from(problems.PADDINGS)),
        layouts=draw(st.tuples(*3 * [st.sampled_from(problems.LAYOUTS)])),
        ids=draw(st.sampled_from(problems.IDS)),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    case = draw(shapes())
    n = case.length
    return replace(
        case,
        rows=draw(st.sampled_from([None, None, 1, max(n // 3, 1), max(n - 1, 1), *([n + n // 4] if n < 500 else [])])),
        own_query_modality=draw(st.booleans()),
        is_causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.05, 0.3, -0.2])),
        sink=draw(st.sampled_from(problems.SINKS)),
        bias=draw(st.sampled_from(problems.BIASES)),
        ranges=draw(st.sampled_from(problems.RANGES)),
        combine=draw(st.sampled_from(["joint", "split"])),
    )


@st.composite
def align_cases(draw: st.DrawFn) -> Case:
    return replace(
        draw(shapes()),
        kind=draw(st.sampled_from(["covariance", "gram"])),
        context=draw(st.sampled_from(problems.CONTEXTS)),
        fusion=draw(st.sampled_from(problems.FUSIONS)),
        given_basis=draw(st.booleans()),
        float32_tables=draw(st.booleans()),
    )


@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@SETTINGS
@given(case=attention_cases())
def test_attention(dtype: torch.dtype, case: Case):
    mass = "modality" if case.seed % 2 else True
    check("modular_attention", attention_problem(case, dtype), dtype, return_mass=mass)


@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@SETTINGS
@given(case=align_cases())
def test_alignment(dtype: torch.dtype, case: Case):
    check("duplex_align", align_problem(case, dtype), dtype)
