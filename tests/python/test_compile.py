"""Under torch.compile with fullgraph=True: forward, backward, autocast, changing shapes; and the meta device."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_settings

from moda_attn import functional as F
from moda_attn.errors import ModaValueError

IDS = torch.tensor([[0, 0, 1, 1, 2, 0, -1], [-1, 0, 2, 1, 1, 0, 0]])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def leaves() -> dict[str, Tensor]:
    """Everything that a layer learns or computes on, as leaves."""
    given = {
        "query": torch.randn(2, 4, 7, 8),
        "key": torch.randn(2, 2, 7, 8),
        "value": torch.randn(2, 2, 7, 8),
        "keep": torch.randn(3, 8, 8),
        "mix": torch.randn(3, 8, 8),
        "decay": torch.rand(3, 4),
        "base": torch.randn(3, 4),
        "modality_bias": torch.randn(1, 4, 3, 3),
    }
    return {name: tensor.requires_grad_() for name, tensor in given.items()}


def layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    mix: Tensor,
    decay: Tensor,
    base: Tensor,
    modality_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three operators in a row, between ordinary torch ones."""
    position = (IDS >= 0).cumsum(-1) - 1
    sink = F.pseudo_sink(position, IDS, 32, decay, base)
    aligned, basis = F.duplex_align(key * 2, value, IDS, keep, mix)
    out, mass = F.modular_attention(
        query, aligned, value, IDS, sink=sink, modality_bias=modality_bias, key_range=position_range(), return_mass=True
    )
    return out.transpose(1, 2).relu(), basis, mass


def position_range() -> Tensor:
    """A window of four keys."""
    last = torch.arange(1, 8)[None]
    return torch.stack([last - 4, last], dim=-1)


def split(query: Tensor, key: Tensor, value: Tensor, modality_bias: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
    """Attention with two softmaxes, and the mass by modality."""
    options = {"modality_bias": modality_bias, "combine": "split", "return_mass": "modality"}
    return F.modular_attention(query, key, value, IDS, **options)


def test_the_layer_compiles_whole():
    check(lambda **x: layer(**x), leaves())


@pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="inductor needs a C++ compiler and Python's headers",
)
def test_inductor_compiles_the_layer_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor_settings.patch(compile_threads=1):  # no pool of processes that outlives the test
        check(lambda **x: layer(**x), leaves(), "inductor")


def test_split_compiles_whole():
    check(
        lambda **x: split(**x), {k: v for k, v in leaves().items() if k in ("query", "key", "value", "modality_bias")}
    )


def check(function: Callable[..., tuple[Tensor, ...]], given: dict[str, Tensor], backend: str = "aot_eager") -> None:
    """Outputs and gradients, compiled and not."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results: list[tuple[Any, ...]] = []
    for run in (function, compiled):
        outputs = run(**given)
        loss = sum(output.square().sum() for output in outputs if output.requires_grad)
        results.append((*outputs, *torch.autograd.grad(loss, list(given.values()))))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def test_one_graph_serves_every_length():
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def attention(query: Tensor, ids: Tensor) -> Tensor:
        return F.modular_attention(query, query, query, ids)

    for length in (5, 8, 13):
        query, ids = torch.randn(1, 2, length, 4), torch.zeros(1, length, dtype=torch.long)
        assert torch.equal(attention(query, ids), F.modular_attention(query, query, query, ids))
    assert len(graphs) == 1


def test_autocast_compiles():
    query, ids = torch.randn(1, 2, 6, 8), torch.zeros(1, 6, dtype=torch.long)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attention() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.modular_attention(query, query, query, ids)

    assert attention().dtype == torch.bfloat16
    half = query.bfloat16()
    assert torch.equal(attention(), F.modular_attention(half, half, half, ids))


def test_a_compiled_call_raises_at_the_bad_input():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attention(query: Tensor, ids: Tensor) -> Tensor:
        return F.modular_attention(query, query, query, ids)

    query = torch.randn(1, 2, 6, 8)
    with pytest.raises(ModaValueError, match=r"modality\[0, 0\] is -4"):
        attention(query, torch.full((1, 6), -4))


def test_meta_tensors_have_shapes():
    query, key = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 7, 8, device="meta", dtype=torch.float32)
    ids = torch.empty(2, 7, device="meta", dtype=torch.long)
    out, mass = F.modular_attention(query, key, key, ids, return_mass=True)
    assert (out.shape, mass.shape, out.device.type) == ((2, 4, 5, 8), (2, 4, 5, 3), "meta")
    _, mass = F.modular_attention(query, key, key, ids, num_modalities=4, return_mass="modality")
    assert mass.shape == (2, 4, 5, 5)
    table = torch.empty(3, 8, 8, device="meta")
    aligned, basis = F.duplex_align(key, key, ids, table, table)
    assert (aligned.shape, basis.shape) == ((2, 2, 7, 8), (2, 2, 3, 8, 8))
    rates = torch.empty(3, 4, device="meta")
    assert F.pseudo_sink(ids, ids, 9, rates, rates).shape == (2, 4, 7)


def test_export_keeps_the_operator():
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, ids: Tensor) -> Tensor:
            return F.modular_attention(query, query, query, ids)

    query, ids = torch.randn(1, 2, 6, 8), torch.zeros(1, 6, dtype=torch.long)
    program = torch.export.export(Attention(), (query, ids))
    assert any("moda_attn.modular_attention" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(query, ids), Attention()(query, ids))
