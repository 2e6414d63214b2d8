"""What holds on every device: the reference's numbers, the same bits every time, bad rows, pseudo-scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import parity
from moda_attn import functional as F
from moda_attn import reference
from parity import check, evaluate, promote
from problems import DTYPES, STAPLES, Case, align_problem, attention_problem, sink_problem
from tolerance import assert_close

everywhere = pytest.mark.parametrize("device", parity.DEVICES)
#: What vision-language models have, in tiles and beside them.
WIDE = (
    Case(length=517, heads=8, kv_heads=2, dim=128, modalities=2, padding="left"),
    Case(length=260, heads=4, kv_heads=4, dim=256, modalities=2, is_causal=False, sink="none", bias="none"),
    Case(length=1030, rows=1, heads=8, kv_heads=2, dim=128, modalities=3),
    Case(length=200, heads=2, kv_heads=2, dim=64, modalities=2, layouts=("transposed", "strided", "columns")),
)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*STAPLES, *WIDE], ids=lambda case: f"{case.length}x{case.dim}")
def test_the_reference_is_met(case: Case, dtype: torch.dtype, device: str):
    mass = "modality" if case.ranges == "window" else True
    check("modular_attention", attention_problem(case, dtype), dtype, device=device, return_mass=mass)
    check("duplex_align", align_problem(case, dtype), dtype, device=device)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.5])
def test_pseudo_scores(decay: float, dtype: torch.dtype, device: str):
    case = Case(length=300, batch=2, heads=4, modalities=3, padding="left")
    arguments = sink_problem(case, dtype, span=4096, decay=decay, spread=0)
    got, upstream = evaluate(F.pseudo_sink, arguments, device=device)
    truth, _ = evaluate(reference.pseudo_sink, promote(arguments), upstream)
    for name, tensor in got.items():
        assert_close(tensor, truth[name], name=name, gradient=name != "output 0")


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", ["joint", "split"])
def test_two_calls_give_the_same_bits(combine: str, dtype: torch.dtype, device: str):
    case = Case(length=300, batch=2, heads=6, kv_heads=2, dim=40, modalities=3, padding="left", combine=combine)
    problems = ((F.modular_attention, attention_problem(case, dtype)), (F.duplex_align, align_problem(case, dtype)))
    for operator, problem in problems:
        first, second = (evaluate(operator, problem, device=device)[0] for _ in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{operator.__name__}: {name}"


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_query_spoils_its_own_row_alone(dtype: torch.dtype, device: str):
    case = Case(length=111, heads=4, kv_heads=2, dim=40, modalities=3)
    problem = {name: parity.moved(value, device) for name, value in attention_problem(case, dtype).items()}
    clean = F.modular_attention(**problem)
    for poison in (torch.nan, torch.inf):
        query = problem["query"].clone()
        query[0, 2, 31, 7] = poison
        out = F.modular_attention(**{**problem, "query": query})
        others = torch.ones(out.shape[:3], dtype=torch.bool, device=device)
        others[0, 2, 31] = False
        assert torch.equal(out[others], clean[others])
        assert out[0, 2, 31].isnan().all()


@everywhere
@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (1, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
def test_what_is_empty_is_empty_or_zero(sizes: tuple[int, int, int, int], device: str):
    batch, heads, queries, keys = sizes
    query = torch.randn(batch, heads, queries, 16, device=device, requires_grad=True)
    key = torch.randn(batch, heads, keys, 16, device=device, requires_grad=True)
    ids = torch.zeros(batch, keys, dtype=torch.long, device=device)
    own = torch.zeros(batch, queries, dtype=torch.long, device=device)
    out = F.modular_attention(query, key, key, ids, query_modality=own)
    out.sum().backward()
    assert out.shape == query.shape
    for tensor in (query.grad, key.grad, *([out] if keys == 0 else [])):
        assert not tensor.any()


@everywhere
def test_autocast_takes_its_dtype(device: str):
    problem = attention_problem(replace(STAPLES[0], dim=64), torch.float32)
    problem = {name: parity.moved(value, device) for name, value in problem.items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        assert F.modular_attention(**problem).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda"])
def test_calls_stay_on_their_stream(device: str):
    problem = attention_problem(replace(STAPLES[0], dim=64), torch.bfloat16)
    problem = {name: parity.moved(value, device) for name, value in problem.items()}
    truth = F.modular_attention(**problem)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # what is not on this stream runs long before its query is there
        late = problem["query"].clone().mul_(1)
        assert torch.equal(F.modular_attention(**{**problem, "query": late}), truth)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("device", ["cuda"])
def test_another_device_than_the_current_one(device: str):
    problem = attention_problem(replace(STAPLES[0], dim=64), torch.bfloat16)
    first, second = (
        {name: parity.moved(value, f"{device}:{index}") for name, value in problem.items()} for index in range(2)
    )
    assert torch.cuda.current_device() == 0
    assert torch.equal(F.modular_attention(**second).cpu(), F.modular_attention(**first).cpu())
    assert torch.cuda.current_device() == 0
