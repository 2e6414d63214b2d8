"""The registered operators: against the dense reference, opcheck, gradcheck, views, autocast, double backward, fork."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from moda_attn import functional as F
from moda_attn import reference
from moda_attn.errors import ModaError, ModaRuntimeError
from tolerance import BOUNDS, assert_close, relative_l2

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODALITY = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 0, 1], [-1, -1, 0, 1, 1, 0, 0, 2, -1]])


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_inputs(
    dtype: torch.dtype = torch.float64,
    combine: str = "joint",
    rows: int | None = None,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    broadcast: bool = False,
) -> dict[str, Any]:
    """Arguments of modular_attention by name, with every option in use."""
    batch, keys = MODALITY.shape
    rows, work = keys if rows is None else rows, arithmetic(dtype)
    own = (1, 1) if broadcast else (batch, heads[0])
    return {
        "query": torch.randn(batch, heads[0], rows, dim, dtype=dtype),
        "key": torch.randn(batch, heads[1], keys, dim, dtype=dtype),
        "value": torch.randn(batch, heads[1], keys, dim, dtype=dtype),
        "modality": MODALITY,
        "sink": torch.randn(*own, rows, *((2,) if combine == "split" else ()), dtype=work),
        "modality_bias": torch.randn(*own, 3, 3, dtype=work),
        "combine": combine,
    }


def key_ranges(batch: int = MODALITY.shape[0]) -> Tensor:
    """Ranges for all rows of `attention_inputs`."""
    return torch.randint(-2, MODALITY.shape[1] + 2, (batch, MODALITY.shape[1], 2)).sort().values


def align_inputs(dtype: torch.dtype = torch.float64, dim: int = 8, table: torch.dtype | None = None) -> dict[str, Any]:
    batch, keys = MODALITY.shape
    return {
        "key": torch.randn(batch, 2, keys, dim, dtype=dtype),
        "value": torch.randn(batch, 2, keys, dim, dtype=dtype),
        "modality": MODALITY,
        "keep": torch.randn(3, dim, dim, dtype=dtype).to(table or dtype),
        "mix": torch.randn(3, dim, dim, dtype=dtype).to(table or dtype),
    }


def sink_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    position = (MODALITY >= 0).cumsum(-1) - 1
    return {
        "position": position.clamp(min=0),
        "query_modality": MODALITY,
        "span": 7,
        "decay": torch.rand(3, 4, dtype=dtype),
        "base": torch.randn(3, 4, dtype=dtype),
    }


def run(operator: Any, inputs: dict[str, Any], **options: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and gradients of every floating input under a fixed random upstream gradient."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = operator(**{**inputs, **leaves}, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    loss = 0
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if output.requires_grad:
            loss = loss + (output.double() * weight).masked_fill(output.detach().isinf(), 0).sum()
    # The dense reference does not touch what has no part in the result: zeros, as the operators say.
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return outputs, dict(zip(leaves, gradients, strict=True))


def promote(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def compare(name: str, inputs: dict[str, Any], **options: Any) -> None:
    """Outputs and gradients of one operator against the dense float64 reference, within the bounds of the main dtype.

    The small tables stay in float32 beside half-precision inputs; their gradients are only as good as those inputs.
    """
    got, gradients = run(getattr(F, name), inputs, **options)
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    truth, true_gradients = run(getattr(reference, name), promote(inputs), **wide)
    dtype = next(v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    output_bound, gradient_bound = BOUNDS[dtype]
    for index, output in enumerate(got):
        assert relative_l2(output, truth[index]) <= output_bound, f"output {index}"
    for leaf, gradient in gradients.items():
        assert gradient.dtype == inputs[leaf].dtype
        assert gradient.shape == inputs[leaf].shape
        bound = max(gradient_bound, BOUNDS[gradient.dtype][1])
        assert relative_l2(gradient, true_gradients[leaf]) <= bound, f"gradient of {leaf}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", ["joint", "split"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("broadcast", [True, False])
def test_attention_is_the_reference(dtype: torch.dtype, combine: str, causal: bool, broadcast: bool):
    inputs = attention_inputs(dtype, combine, broadcast=broadcast)
    compare("modular_attention", inputs, is_causal=causal, return_mass=True)


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("combine", ["joint", "split"])
def test_attention_with_fewer_queries_is_the_reference(rows: int, combine: str):
    compare("modular_attention", attention_inputs(torch.float32, combine, rows=rows), scale=0.3)


def test_attention_without_options_and_with_own_query_modality():
    inputs = attention_inputs(torch.float32, rows=12)
    del inputs["sink"], inputs["modality_bias"]
    compare("modular_attention", inputs, query_modality=torch.randint(-1, 3, (2, 12)), is_causal=False)


def test_a_forbidden_pair_is_not_seen():
    inputs = attention_inputs(torch.float64)
    inputs["modality_bias"][..., 0, 1] = -torch.inf
    out, mass = F.modular_attention(**inputs, return_mass=True)
    wanted, wanted_mass = reference.modular_attention(**inputs, return_mass=True)
    assert_close(out, wanted, name="out")
    assert_close(mass, wanted_mass, name="mass")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["covariance", "gram"])
@pytest.mark.parametrize("context", [None, MODALITY.new_tensor([[1, 1, 1, 0, 0, 1, 1, 0, 1]]).bool().expand(2, 9)])
def test_alignment_is_the_reference(dtype: torch.dtype, kind: str, context: Tensor | None):
    compare("duplex_align", align_inputs(dtype), kind=kind, context=context)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_takes_float32_tables(dtype: torch.dtype):
    compare("duplex_align", align_inputs(dtype, table=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_with_a_given_basis_is_the_reference(dtype: torch.dtype):
    inputs = align_inputs(dtype)
    _, basis = F.duplex_align(**inputs)
    aligned, returned = F.duplex_align(**inputs, basis=basis)
    assert returned is basis
    assert torch.equal(aligned, F.duplex_align(**inputs)[0])
    compare("duplex_align", {**inputs, "basis": basis})


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_pseudo_sink_is_the_reference(dtype: torch.dtype):
    inputs = sink_inputs(dtype)
    inputs["decay"][0] = torch.tensor([0.0, 1e-9, 30.0, 2.0**-8])
    compare("pseudo_sink", inputs)


def test_ids_and_positions_of_any_integer_dtype():
    inputs, sinks = attention_inputs(torch.float32), sink_inputs(torch.float32)
    out, sink = F.modular_attention(**inputs), F.pseudo_sink(**sinks)
    for dtype in (torch.int8, torch.int16, torch.int32):
        ids = MODALITY.to(dtype)
        assert torch.equal(F.modular_attention(**{**inputs, "modality": ids}), out)
        moved = {"position": sinks["position"].to(dtype), "query_modality": ids}
        assert torch.equal(F.pseudo_sink(**{**sinks, **moved}), sink)


# torch's own checks of an operator.


def operator_samples() -> list[Any]:
    """(operator, arguments): every operator, every combination of options, with gradients wanted."""
    ops, samples = torch.ops.moda_attn, []

    def wish(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().requires_grad_()

    for combine, tables, mass in itertools.product(("joint", "split"), (True, False), (True, False)):
        x = attention_inputs(torch.float32, combine, broadcast=mass)
        sink, bias = (wish(x["sink"]), wish(x["modality_bias"])) if tables else (None, None)
        main = (wish(x["query"]), wish(x["key"]), wish(x["value"]), MODALITY)
        ranges = key_ranges(1 if mass else 2) if tables else None
        options = (None if mass else MODALITY, True, None if mass else 0.2, sink, bias, ranges, combine)
        wanted = (3, "modality") if mass else (None, "relation" if tables else "none")
        samples.append((ops.modular_attention.default, (*main, *options, *wanted)))
        results = ops.modular_attention.default(*main, *options, *wanted)
        out, logsumexp, parts, _ = (result.detach() for result in results)
        upstream = (torch.ones(1).expand_as(out), out, logsumexp, parts, tables, tables)
        samples.append((ops.modular_attention_backward.default, (*main, *options, *upstream)))
    for kind, given in itertools.product(("covariance", "gram"), (True, False)):
        x = align_inputs(torch.float32)
        tensors = (wish(x["key"]), wish(x["value"]), MODALITY, wish(x["keep"]), wish(x["mix"]))
        context = None if given else MODALITY == 0
        basis = F.duplex_align(*tensors)[1].detach()
        samples.append((ops.duplex_align.default, (*tensors, kind, context, wish(basis) if given else None, 1e-6)))
        upstream = (torch.ones_like(x["key"]), None if given else torch.ones_like(basis))
        samples.append(
            (ops.duplex_align_backward.default, (*tensors, kind, context, basis, not given, 1e-6, *upstream))
        )
    x = sink_inputs(torch.float32)
    arguments = (x["position"], x["query_modality"], x["span"], wish(x["decay"]), wish(x["base"]))
    samples.append((ops.pseudo_sink.default, arguments))
    samples.append((ops.pseudo_sink_backward.default, (*arguments, torch.ones(2, 4, 9))))
    return samples


SAMPLES = operator_samples()


@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=lambda i: f"{SAMPLES[i][0].name().split('::')[1]}-{i}")
def test_opcheck(index: int):
    operator, arguments = SAMPLES[index]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "backward" not in operator.name():
        # The backward operators have no derivative to be traced: they raise, which is tested below.
        utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=utils)


def gradcheck(function: Any, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, [tensor.detach().requires_grad_() for tensor in inputs], fast_mode=False)


@pytest.mark.parametrize("combine", ["joint", "split"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("broadcast", [True, False])
def test_gradcheck_of_attention(combine: str, causal: bool, broadcast: bool):
    x = attention_inputs(combine=combine, heads=(2, 1), dim=3, broadcast=broadcast)
    ranges = key_ranges() if broadcast else None

    def attention(query: Tensor, key: Tensor, value: Tensor, sink: Tensor, bias: Tensor) -> Tensor:
        options = {"sink": sink, "modality_bias": bias, "key_range": ranges, "combine": combine, "is_causal": causal}
        return F.modular_attention(query, key, value, MODALITY, **options)

    gradcheck(attention, x["query"], x["key"], x["value"], x["sink"], x["modality_bias"])


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"query_modality": MODALITY.flip(0)}])
def test_gradcheck_of_attention_without_tables(options: dict[str, Any]):
    x = attention_inputs(heads=(2, 2), dim=2)
    gradcheck(lambda q, k, v: F.modular_attention(q, k, v, MODALITY, **options), x["query"], x["key"], x["value"])


@pytest.mark.parametrize("kind", ["covariance", "gram"])
@pytest.mark.parametrize("context", [None, MODALITY % 2 == 0])
def test_gradcheck_of_alignment(kind: str, context: Tensor | None):
    x = align_inputs(dim=3)
    tensors = x["key"][:, :1], x["value"][:, :1], x["keep"], x["mix"]
    gradcheck(
        lambda k, v, keep, mix: F.duplex_align(k, v, MODALITY, keep, mix, kind=kind, context=context, eps=1e-3),
        *tensors,
    )


def test_gradcheck_of_alignment_with_a_given_basis():
    x = align_inputs(dim=3)
    basis = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64)
    gradcheck(
        lambda k, keep, mix, basis: F.duplex_align(k, x["value"], MODALITY, keep, mix, basis=basis),
        x["key"],
        x["keep"],
        x["mix"],
        basis,
    )


def test_gradcheck_of_the_basis_alone_and_of_the_keys_alone():
    x = align_inputs(dim=3)
    for index in (0, 1):
        gradcheck(
            lambda k, v, index=index: F.duplex_align(k, v, MODALITY, x["keep"], x["mix"], eps=1e-3)[index],
            x["key"],
            x["value"],
        )


def test_gradcheck_of_pseudo_sink():
    x = sink_inputs()

    def finite(decay: Tensor, base: Tensor) -> Tensor:
        sink = F.pseudo_sink(x["position"], MODALITY, 7, decay, base)
        return sink.masked_fill(sink.isinf(), 0)

    gradcheck(finite, x["decay"], x["base"])


def test_only_what_is_wanted_gets_a_gradient():
    x = attention_inputs(torch.float32)
    x["sink"].requires_grad_()
    out, mass = F.modular_attention(**x, return_mass=True)
    assert out.requires_grad
    assert not mass.requires_grad
    out.sum().backward()
    assert x["sink"].grad is not None
    assert x["query"].grad is None
    assert not F.modular_attention(**attention_inputs(torch.float32)).requires_grad


def test_a_double_backward_says_that_it_is_not_there():
    x, y, z = attention_inputs(), align_inputs(), sink_inputs()
    x["query"].requires_grad_(), y["key"].requires_grad_(), z["decay"].requires_grad_()
    z["span"] = 100
    for output, leaf in (
        (F.modular_attention(**x), x["query"]),
        (F.duplex_align(**y)[0], y["key"]),
        (F.pseudo_sink(**z)[1, :, 2:], z["decay"]),
    ):
        (first,) = torch.autograd.grad(output.pow(2).sum(), leaf, create_graph=True)
        with pytest.raises(ModaRuntimeError, match="double backward"):
            first.sum().backward()


# Memory layouts.


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same numbers in other strides."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return {
        "transposed": tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "last dimension strided": wide[..., ::2],
        "last dimension outermost": tensor.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "offset": torch.cat([torch.zeros_like(tensor[:, :, :1]), tensor], dim=2)[:, :, 1:],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_strided_views_give_the_same_result(layout: str):
    x, y = attention_inputs(torch.float32), align_inputs(torch.float32)
    for operator, inputs in ((F.modular_attention, x), (F.duplex_align, y)):
        moved = {
            name: layouts(value)[layout] if name in ("query", "key", "value") else value
            for name, value in inputs.items()
        }
        assert any(not value.is_contiguous() for value in moved.values() if isinstance(value, Tensor))
        got, gradients = run(operator, moved)
        wanted, wanted_gradients = run(operator, inputs)
        for a, b in zip((*got, *gradients.values()), (*wanted, *wanted_gradients.values()), strict=True):
            assert torch.equal(a, b)


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
    x = attention_inputs(torch.float32)
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
    x = attention_inputs(torch.float32)
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


def test_a_bad_row_stays_alone():
    x = attention_inputs(torch.float32)
    clean = F.modular_attention(**x)
    for poison in (torch.nan, torch.inf):
        query = x["query"].clone()
        query[0, 1, 4] = poison
        out = F.modular_attention(**{**x, "query": query})
        assert out[0, 1, 4].isnan().all()
        out[0, 1, 4] = clean[0, 1, 4]
        assert torch.equal(out, clean)


@pytest.mark.parametrize("combine", ["joint", "split"])
@pytest.mark.parametrize("poison", [torch.nan, 3e38])
def test_what_padding_holds_reaches_nothing(combine: str, poison: float):
    x, y = attention_inputs(torch.float32, combine), align_inputs(torch.float32)
    hidden = (MODALITY < 0)[:, None, :, None]
    for operator, inputs, names in (
        (F.modular_attention, x, ("query", "key", "value")),
        (F.duplex_align, y, ("key", "value")),
    ):
        dirty = {**inputs, **{name: inputs[name].masked_fill(hidden, poison) for name in names}}
        clean = {**inputs, **{name: inputs[name].masked_fill(hidden, 0) for name in names}}
        (got, *others), gradients = run(operator, dirty)
        (wanted, *wanted_others), wanted_gradients = run(operator, clean)
        # Alignment passes padding keys through as they are; the loss weighs them, their gradient is the upstream one.
        assert torch.equal(got.masked_fill(hidden, 0), wanted.masked_fill(hidden, 0))
        for a, b in zip((*others, *gradients.values()), (*wanted_others, *wanted_gradients.values()), strict=True):
            assert torch.equal(a, b)


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    ids = torch.randint(-1, 3, (2, 300))
    x = {**attention_inputs(torch.float32), "modality": ids, "sink": torch.randn(2, 4, 300)}
    x |= {name: torch.randn(2, heads, 300, 40) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    y = {"key": x["key"], "value": x["value"], "modality": ids, "keep": torch.randn(3, 40, 40)}
    y["mix"] = torch.randn(3, 40, 40)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs, gradients = run(F.modular_attention, x, return_mass=True)
            aligned, align_gradients = run(F.duplex_align, y)
            results.append((*outputs, *gradients.values(), *aligned, *align_gradients.values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_does(dtype: torch.dtype):
    x, y = attention_inputs(torch.float32), align_inputs(torch.float32)
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
    x = attention_inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.modular_attention(**x)
    assert out.dtype == torch.float64
    assert torch.equal(out, F.modular_attention(**x))


def test_autocast_mixes_what_it_can_cast():
    x = attention_inputs(torch.float32)
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
        return torch.tensor(check())

loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
assert all(bool(ok) for ok in loader)
assert check()
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_forked_process_and_data_loader_workers_can_use_the_operators():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr
