"""From torch to a CUDA kernel without a GPU, in processes whose driver notes what it is asked and runs nothing."""

from __future__ import annotations

import pytest
import torch

from fake_gpu import run
from moda_attn import _cuda
from moda_attn.errors import ModaRuntimeError, ModaValueError

pytestmark = pytest.mark.skipif(not _cuda.IS_BUILT, reason="the extension was built without the feature cuda")


OPERATORS = """
ids = torch.zeros(2, 40, dtype=torch.int32)
def numbers(*shape, kind=torch.bfloat16):
    return torch.randn(*shape).to(kind)
for dim in (64, 20):
    query, key, value = numbers(2, 4, 40, dim), numbers(2, 2, 40, dim), numbers(2, 2, 40, dim)
    sink, bias = numbers(1, 4, 40, kind=torch.float32), numbers(1, 1, 2, 2, kind=torch.float32)
    inputs = (query, key, value, ids, None, True, None, sink, bias, None, "joint", 2)
    results = call("modular_attention", *inputs, "relation")
    print([tuple(result.shape) for result in results], all(result.is_contiguous() for result in results))
    out, logsumexp, parts, _ = results
    given = (*inputs[:-1], numbers(2, 4, 40, dim), out, logsumexp, parts, True, True)
    print([tuple(result.shape) for result in call("modular_attention_backward", *given)])
    keep, mix = numbers(2, dim, dim), numbers(2, dim, dim)
    inputs = (key, value, ids, keep, mix, "covariance", None)
    aligned, basis = call("duplex_align", *inputs, None, 1e-6)
    print(tuple(aligned.shape), tuple(basis.shape))
    given = (*inputs, basis, True, 1e-6, numbers(2, 2, 40, dim), None)
    print([tuple(result.shape) for result in call("duplex_align_backward", *given)])
position, decay = torch.arange(40).repeat(2, 1), numbers(2, 4, kind=torch.float32)
sink = call("pseudo_sink", position, ids, 99, decay, decay)
print(tuple(sink.shape), [tuple(g.shape) for g in call("pseudo_sink_backward", position, ids, 99, decay, decay, sink)])
made = launches()
print(len(made) > 10, all(line.endswith(f"stream {STREAM:#x})") for line in made), sum(size > 0 for size in allocated))
"""


def test_every_operator_reaches_the_driver_on_torchs_stream():
    wanted = []
    for dim in (64, 20):
        rows, keys, tables = f"(2, 4, 40, {dim})", f"(2, 2, 40, {dim})", f"(2, {dim}, {dim})"
        wanted += [
            f"[{rows}, (2, 4, 1, 40), (0,), (2, 4, 40, 3)] True",
            f"[{rows}, {keys}, {keys}, (2, 4, 40, 1), (2, 4, 2, 2)]",
            f"{keys} (2, 2, 2, {dim}, {dim})",
            f"[{keys}, {keys}, {tables}, {tables}, (0,)]",
        ]
    assert run(OPERATORS) == [*wanted, "(2, 4, 40) [(2, 4), (2, 4)]", "True True 8"]


VIEWS = """
ids = torch.zeros(1, 9, dtype=torch.int64)
wide = torch.randn(1, 9, 2, 36)
seen = []
real = _native.cuda_attend_forward
def spy(inputs, *rest):
    query = inputs[0]
    seen.append(query.data_ptr() == first.data_ptr())
    assert query.stride(-1) == 1 and query.data_ptr() % 16 == 0 and query.shape[-1] % 8 == 0
    return real(inputs, *rest)
_native.cuda_attend_forward = spy
whole = torch.randn(1, 2, 9, 32)
for first in (
    whole,
    wide[..., :32].transpose(1, 2),
    whole[:, :1].expand(1, 2, 9, 32),
    wide[..., 1:33].transpose(1, 2),
    whole.transpose(-1, -2).contiguous().transpose(-1, -2),
    torch.randn(1, 2, 9, 30),
    whole[..., ::2],
):
    key = torch.randn(1, 1, 9, first.shape[-1])
    call("modular_attention", first, key, key, ids, None, True, None, None, None, None, "joint", None, "none")
print(seen)
"""


def test_only_rows_that_kernels_cannot_read_are_copied():
    assert run(VIEWS) == ["[True, True, True, False, False, False, False]"]


FLAT = """
ids = torch.zeros(1, 9, dtype=torch.int64)
def part(*shape):
    return torch.randn(1 + torch.Size(shape).numel())[1:].view(shape)
key, keep, mix, basis = part(1, 2, 9, 16), part(2, 16, 16), part(2, 16, 16), part(1, 2, 2, 16, 16)
assert keep.is_contiguous() and keep.data_ptr() % 16
inputs = (key, key, ids, keep, mix, "covariance", None, basis)
print(tuple(call("duplex_align", *inputs, 1e-6)[0].shape))
print(len(call("duplex_align_backward", *inputs, True, 1e-6, part(1, 2, 9, 16), part(1, 2, 2, 16, 16))))
"""


def test_tables_may_be_parts_of_a_flat_parameter():
    assert run(FLAT) == ["(1, 2, 9, 16)", "5"]


BAD = """
ids = torch.zeros(1, 9, dtype=torch.int64)
def attempt(query=(1, 2, 9, 32), key=(1, 1, 9, 32), ids=ids, sink=None, turn=lambda x: x):
    query, key = torch.randn(*query), torch.randn(*key)
    try:
        given = (turn(query), key, key, ids, None, True, None, sink, None, None, "joint", None, "none")
        call("modular_attention", *given)
    except errors.ModaError as error:
        print(error.variant, error)
attempt(query=(1, 2, 9, 31))
attempt(query=(1, 2, 9, 320), key=(1, 1, 9, 320))
attempt(key=(1, 9, 32))
attempt(ids=ids.float())
attempt(sink=torch.zeros(1, 1, 9, dtype=torch.float16))
attempt(turn=lambda query: query.int())
import fake_cuda
fake_cuda.on_cuda = lambda value: value if type(value) is OnSecond else on_cuda(value)
attempt(sink=torch.zeros(1, 1, 9).as_subclass(OnSecond))
fake_cuda.on_cuda = lambda value: value if getattr(value, "ndim", 0) == 3 else on_cuda(value)
attempt(sink=torch.zeros(1, 1, 9))
print(len(launches()))
"""


def test_what_does_not_fit_is_refused_in_the_words_of_the_cpu():
    assert run(BAD) == [
        "Shape key has shape (1, 1, 9, 32); wanted (1, 1, 9, 31) = (B, Hkv, Nk, D) with the B and D of query",
        "Shape query has shape (1, 2, 9, 320); wanted a head dimension D that is a multiple of 8 and at most 256"
        " on CUDA",
        "Shape key has shape (1, 9, 32); wanted (B, Hkv, Nk, D)",
        "DType modality has dtype float32; wanted an integer dtype",
        "DType sink has dtype float16; wanted float32",
        "DType query has dtype int32; wanted float16, bfloat16, float32 or float64",
        "Device sink is on device cuda:1; wanted cuda:0, the device of query",
        "Device sink is on device cpu; wanted cuda:0, the device of query",
        "0",
    ]


DESCRIBED = """
info = _native.cuda_info()
print(info["driver"], "|", *info["gpus"])
print(any(line.startswith("cuda") and "Fake GPU" in line for line in moda_attn.explain().splitlines()))
"""


def test_what_there_is_is_described():
    first, second = run(DESCRIBED)
    usable = "Fake GPU, sm_80, 108 multiprocessors, usable"
    assert first == f"CUDA 13.2 | cuda:0 {usable} cuda:1 {usable}"
    assert second == "True"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver_the_reason_is_given():
    from moda_attn import _native

    assert _native.cuda_info()["driver"].startswith("none: no CUDA driver was found")
    with pytest.raises(ModaRuntimeError, match="no CUDA driver was found") as caught:
        _native.cuda_check(0)
    assert caught.value.variant == "DriverMissing"


def test_a_host_tensor_is_no_cuda_tensor():
    from moda_attn import _native

    ids = torch.zeros(1, 4, dtype=torch.int64)
    place = (0, lambda count: torch.empty(count, dtype=torch.uint8))
    with pytest.raises(ModaValueError, match="position is on device cpu; wanted cuda"):
        _native.cuda_sink_forward((ids, ids, 4, torch.zeros(1, 1), torch.zeros(1, 1)), torch.zeros(1, 1, 4), place)
