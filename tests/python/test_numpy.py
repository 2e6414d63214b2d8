"""The operators on NumPy arrays: equal to the torch ones bit for bit, and torch is not imported for them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from moda_attn import functional as F
from moda_attn import numpy as N
from moda_attn.errors import ModaTypeError, ModaValueError

DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
IDS = np.array([[0, 1, 1, 0, 2, -1], [1, 0, 0, 2, 2, 1]])


def numbers(*shape: int, dtype: str = "float32") -> np.ndarray:
    return torch.randn(*shape).numpy().astype(dtype)


def same(array: np.ndarray, tensor: torch.Tensor) -> bool:
    assert isinstance(array, np.ndarray)
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    return array.shape == tuple(tensor.shape) and np.array_equal(array, tensor.numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", ["joint", "split"])
def test_attention(dtype: str, combine: str):
    work = "float64" if dtype == "float64" else "float32"
    query, key, value = (numbers(2, heads, 6, 8, dtype=dtype) for heads in (4, 2, 2))
    sink = numbers(1, 4, 6, *((2,) if combine == "split" else ()), dtype=work)
    bias = numbers(2, 1, 3, 3, dtype=work)
    options = {"scale": 0.4, "is_causal": False, "combine": combine, "return_mass": True}
    out, mass = N.modular_attention(query, key, value, IDS, sink=sink, modality_bias=bias, **options)
    torch_arguments = [torch.from_numpy(array) for array in (query, key, value, IDS)]
    tables = {"sink": torch.from_numpy(sink), "modality_bias": torch.from_numpy(bias)}
    wanted, wanted_mass = F.modular_attention(*torch_arguments, **tables, **options)
    assert same(out, wanted)
    assert same(mass, wanted_mass)
    alone = N.modular_attention(query, key, value, IDS, query_modality=IDS[:, ::-1])
    assert same(alone, F.modular_attention(*torch_arguments, query_modality=torch.from_numpy(IDS).flip(1)))
    options = {**options, "return_mass": "modality"}
    _, mass = N.modular_attention(query, key, value, IDS, num_modalities=5, **options)
    assert same(mass, F.modular_attention(*torch_arguments, num_modalities=5, **options)[1])
    assert mass.shape == (2, 4, 6, 6)
    _, mass = N.modular_attention(query, key, value, IDS, modality_bias=bias, **options)
    assert same(mass, F.modular_attention(*torch_arguments, modality_bias=tables["modality_bias"], **options)[1])
    ranges = np.array([[[0, 2], [-1, 3], [1, 9], [4, 2], [0, 6], [3, 6]]], dtype=np.int16)
    part = N.modular_attention(query, key, value, IDS, key_range=ranges, combine=combine)
    wanted = F.modular_attention(*torch_arguments, key_range=torch.from_numpy(ranges), combine=combine)
    assert same(part, wanted)
    assert not np.array_equal(part, N.modular_attention(query, key, value, IDS, combine=combine))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["covariance", "gram"])
def test_alignment(dtype: str, kind: str):
    key, value = numbers(2, 2, 6, 8, dtype=dtype), numbers(2, 2, 6, 8, dtype=dtype)
    keep, mix = numbers(3, 8, 8), numbers(3, 8, 8, dtype=dtype)
    context = np.arange(6) < [[4], [2]]
    aligned, basis = N.duplex_align(key, value, IDS, keep, mix, kind=kind, context=context, eps=1e-3)
    arguments = [torch.from_numpy(array) for array in (key, value, IDS, keep, mix)]
    wanted, wanted_basis = F.duplex_align(*arguments, kind=kind, context=torch.from_numpy(context), eps=1e-3)
    assert same(aligned, wanted)
    assert same(basis, wanted_basis)
    again, returned = N.duplex_align(key, value, IDS, keep, mix, kind=kind, basis=basis, eps=1e-3)
    assert returned is basis
    assert np.array_equal(again, aligned)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pseudo_sink(dtype: str):
    position = np.arange(6, dtype=np.int16)[None].repeat(2, 0)
    decay, base = abs(numbers(3, 4, dtype=dtype)), numbers(3, 4, dtype=dtype)
    sink = N.pseudo_sink(position, IDS, 5, decay, base)
    assert same(
        sink, F.pseudo_sink(*(torch.from_numpy(a) for a in (position, IDS)), 5, *map(torch.from_numpy, (decay, base)))
    )


def test_bfloat16_where_ml_dtypes_is_there():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 of its own; ml_dtypes is not installed")
    tensor = torch.randn(2, 2, 6, 8).bfloat16()
    array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    out = N.modular_attention(array, array, array, IDS)
    assert out.dtype == ml_dtypes.bfloat16
    wanted = F.modular_attention(tensor, tensor, tensor, torch.from_numpy(IDS))
    assert np.array_equal(out.view(np.int16), wanted.view(torch.int16).numpy())


def test_results_are_fresh_and_inputs_stay():
    query = numbers(1, 1, 6, 8)
    query.flags.writeable = False
    before = query.copy()
    first, second = (N.modular_attention(query, query, query, IDS[:1]) for _ in range(2))
    assert not np.shares_memory(first, second)
    assert first.flags.c_contiguous
    assert first.flags.writeable
    assert np.array_equal(query, before)


def test_bad_input_raises_what_torch_input_raises():
    query = numbers(2, 2, 6, 8)
    with pytest.raises(ModaTypeError, match="query is a list; wanted a tensor"):
        N.modular_attention(query.tolist(), query, query, IDS)
    with pytest.raises(ModaTypeError, match="key has dtype float64; wanted float32"):
        N.modular_attention(query, query.astype(float), query, IDS)
    with pytest.raises(ModaTypeError, match="query has dtype int64"):
        N.modular_attention(query.astype(int), query, query, IDS)
    with pytest.raises(ModaTypeError, match="decay has dtype float16"):
        N.pseudo_sink(IDS, IDS, 4, *[np.ones((3, 2), np.float16)] * 2)
    with pytest.raises(ModaTypeError, match="span is a float"):
        N.pseudo_sink(IDS, IDS, 4.0, *[np.ones((3, 2))] * 2)
    with pytest.raises(ModaValueError, match=r"query has shape \(2, 6, 8\)"):
        N.modular_attention(query[:, 0], query, query, IDS)
    with pytest.raises(ModaValueError, match=r"modality\[0, 4\] is 2"):
        N.duplex_align(query, query, IDS, *[numbers(2, 8, 8)] * 2)


@pytest.mark.parametrize("module", ["numpy", "dlpack"])
def test_torch_is_not_imported(module: str):
    code = f"""
import sys
import numpy
from moda_attn import {module} as ops
query, ids = numpy.ones((1, 1, 4, 8), numpy.float32), numpy.zeros((1, 4), numpy.int64)
out = numpy.from_dlpack(ops.modular_attention(query, query, query, ids))
assert numpy.allclose(out, 1), out
ops.duplex_align(query, query, ids, query[0, :, :1].repeat(8, 1), query[0, :, :1].repeat(8, 1))
assert "torch" not in sys.modules
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch):
    from moda_attn import _arrays

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _arrays.threads() == 3
    for other in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", other)
        assert _arrays.threads() >= 1
