"""The operators as torch sees them: opcheck, what gets a gradient, double backward, autocast, forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moda_attn import functional as F
from moda_attn.errors import ModaError, ModaRuntimeError
from problems import Case, align_problem, attention_problem, sink_problem

OPS = torch.ops.moda_attn
CASE = Case(length=9, batch=2, heads=4, kv_heads=2, dim=8, modalities=3, image="interleaved", padding="left")


def test_ids_and_positions_of_any_integer_dtype():
    inputs, sinks = attention_problem(CASE, torch.float32), sink_problem(CASE, torch.float32, span=7)
    out, sink = F.modular_attention(**inputs), F.pseudo_sink(**sinks)
    for dtype in (torch.int8, torch.int16, torch.int32):
        assert torch.equal(F.modular_attention(**inputs | {"modality": inputs["modality"].to(dtype)}), out)
        moved = {name: sinks[name].to(dtype) for name in ("position", "query_modality")}
        assert torch.equal(F.pseudo_sink(**sinks | moved), sink)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_given_basis_is_used_and_returned(dtype: torch.dtype):
    inputs = align_problem(CASE, dtype)
    aligned, basis = F.duplex_align(**inputs)
    again, returned = F.duplex_align(**inputs | {"basis": basis})
    assert returned is basis
    assert torch.equal(again, aligned)


# torch's own checks of an operator.


def wished(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with their gradients wanted."""
    return {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def opcheck(operator: Any, *arguments: Any) -> None:
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "backward" not in operator.default.name():
        # The backward operators have no derivative to be traced: they raise, which is tested below.
        utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.default, arguments, test_utils=utils)


@pytest.mark.parametrize("combine", ["joint", "split"])
@pytest.mark.parametrize(
    ("tables", "mass"), [("none", "none"), ("none", "modality"), ("plain", "relation"), ("shared", "modality")]
)
def test_opcheck_of_attention(combine: str, tables: str, mass: str):
    ranges = {"none": "none", "plain": "any", "shared": "shared"}[tables]
    x = wished(
        attention_problem(replace(CASE, combine=combine, sink=tables, bias=tables, ranges=ranges), torch.float32)
    )
    query_modality, scale = (None, None) if mass == "modality" else (x["modality"], 0.2)
    given = (x["query"], x["key"], x["value"], x["modality"], query_modality, True, scale)
    given += (x["sink"], x["modality_bias"], x["key_range"], combine)
    wanted = (3 if mass == "modality" else None, mass)
    opcheck(OPS.modular_attention, *given, *wanted)
    out, logsumexp, parts, _ = (result.detach() for result in OPS.modular_attention(*given, *wanted))
    has_tables = tables != "none"
    parts = parts if combine == "split" else None
    upstream = torch.ones(1).expand_as(out)
    opcheck(OPS.modular_attention_backward, *given, upstream, out, logsumexp, parts, has_tables, has_tables)


@pytest.mark.parametrize("kind", ["covariance", "gram"])
@pytest.mark.parametrize("has_basis", [True, False])
def test_opcheck_of_alignment(kind: str, has_basis: bool):
    x = wished(
        align_problem(replace(CASE, given_basis=has_basis, context="all" if has_basis else "scattered"), torch.float32)
    )
    given = (x["key"], x["value"], x["modality"], x["keep"], x["mix"], kind, x["context"])
    opcheck(OPS.duplex_align, *given, x["basis"], 1e-6)
    basis = OPS.duplex_align(*given, x["basis"], 1e-6)[1].detach() if x["basis"] is None else x["basis"].detach()
    upstream = (torch.ones_like(x["key"]), None if has_basis else torch.ones_like(basis))
    opcheck(OPS.duplex_align_backward, *given, basis, not has_basis, 1e-6, *upstream)


def test_opcheck_of_the_pseudo_sink():
    given = tuple(wished(sink_problem(CASE, torch.float32, span=7)).values())
    opcheck(OPS.pseudo_sink, *given)
    opcheck(OPS.pseudo_sink_backward, *given, torch.ones(2, 4, 9))


def test_only_what_is_wanted_gets_a_gradient():
    x = attention_problem(CASE, torch.float32)
    x["sink"].requires_grad_()
    out, mass = F.modular_attention(**x, return_mass=True)
    assert out.requires_grad
    assert not mass.requires_grad
    out.sum().backward()
    assert x["sink"].grad is not None
    assert x["query"].grad is None
    assert not F.modular_attention(**attention_problem(CASE, torch.float32)).requires_grad


def test_a_double_backward_says_that_it_is_not_there():
    x, y = attention_problem(CASE, torch.float64), align_problem(CASE, torch.float64)
    z = sink_problem(replace(CASE, padding="none"), torch.float64, span=100)
    for output, leaf in (
        (lambda: F.modular_attention(**x), x["query"]),
        (lambda: F.duplex_align(**y)[0], y["key"]),
        (lambda: F.pseudo_sink(**z), z["decay"]),
    ):
        leaf.requires_grad_()
        (first,) = torch.autograd.grad(output().pow(2).sum(), leaf, create_graph=True)
        with pytest.raises(ModaRuntimeError, match="double backward"):
            first.sum().backward()


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_does(dtype: torch.dtype):
    x, y = attention_problem(CASE, torch.float32), align_problem(CASE, torch.float32)
    x["query"].requires_grad_()
    cast = {name: value.to(dtype) if name in ("query", "key", "value") else value for name, value in x.items()}
    with torch.autocast("cpu", dtype):
        out = F.modular_attention(**x)
        aligned, basis = F.duplex_align(**y)
        torch_out = torch.nn.functional.scaled_dot_product_attention(x["query"], x["query"], x["query"])
    assert out.dtype == torch_out.dtype == dtype
    assert torch.equal(out, F.modular_attention(**cast))
    assert (aligned.dtype, basis.dtype) == (dtype, torch.float32)
    out.sum().backward()
    assert x["query"].grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    x = attention_problem(CASE, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.modular_attention(**x)
    assert out.dtype == torch.float64
    assert torch.equal(out, F.modular_attention(**x))


def test_autocast_mixes_what_it_can_cast():
    x = attention_problem(CASE, torch.float32)
    x["key"] = x["key"].bfloat16()
    with pytest.raises(ModaError, match="key has dtype bfloat16; wanted float32"):
        F.modular_attention(**x)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.modular_attention(**x).dtype == torch.bfloat16


# Processes.

FORK = """
import os, sys
import torch
from moda_attn import functional as F

torch.set_num_threads(2)
# Small enough that torch's own kernels stay off OpenMP, whose threads do not survive a fork.
x = torch.randn(1, 4, 300, 16)
ids = torch.zeros(1, 300, dtype=torch.long)
wanted = F.modular_attention(x, x, x, ids)

def check():
    torch.set_num_threads(2)
    return torch.equal(F.modular_attention(x, x, x, ids), wanted)

for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert check()

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return check()

# Plain bools, not tensors, which would pass through a shared memory that a container may lack.
loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork", collate_fn=all)
assert all(loader)
assert check()
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_forked_process_and_data_loader_workers_can_use_the_operators():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr
