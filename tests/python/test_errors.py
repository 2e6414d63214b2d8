"""Bad input: every kind of it raises, and so does every error that the extension lists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fake_gpu
import moda_attn
from moda_attn import _native, errors
from moda_attn import functional as F
from moda_attn import numpy as N

B, HQ, HKV, NQ, D, M = 2, 4, 2, 5, 8, 3


def attention(**changed: Any) -> Any:
    """modular_attention on good arguments, except for what is changed."""
    given = {
        "query": torch.randn(B, HQ, NQ, D),
        "key": torch.randn(B, HKV, NQ, D),
        "value": torch.randn(B, HKV, NQ, D),
        "modality": torch.zeros(B, NQ, dtype=torch.long),
    }
    return F.modular_attention(**{**given, **changed})


def align(**changed: Any) -> Any:
    """duplex_align on good arguments, except for what is changed."""
    given = {
        "key": torch.randn(B, HKV, NQ, D),
        "value": torch.randn(B, HKV, NQ, D),
        "modality": torch.zeros(B, NQ, dtype=torch.long),
        "keep": torch.randn(M, D, D),
        "mix": torch.randn(M, D, D),
    }
    return F.duplex_align(**{**given, **changed})


def sink(**changed: Any) -> Any:
    """pseudo_sink on good arguments, except for what is changed."""
    given = {
        "position": torch.zeros(B, NQ, dtype=torch.long),
        "query_modality": torch.zeros(B, NQ, dtype=torch.long),
        "span": 9,
        "decay": torch.rand(M, HQ),
        "base": torch.rand(M, HQ),
    }
    return F.pseudo_sink(**{**given, **changed})


def test_the_good_arguments_are_good():
    assert attention().shape == (B, HQ, NQ, D)
    assert align()[1].shape == (B, HKV, M, D, D)
    assert sink().shape == (B, HQ, NQ)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


SHAPES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (attention, {"query": zeros(B, HQ, NQ, D, 1)}, r"query has shape \(2, 4, 5, 8, 1\); wanted \(B, Hq, Nq, D\)"),
    (attention, {"query": zeros(HQ, NQ, D)}, r"query has shape \(4, 5, 8\)"),
    (attention, {"query": zeros(B, 3, NQ, D)}, r"query has shape \(2, 3, 5, 8\); wanted .* multiple of Hkv = 2"),
    (attention, {"query": zeros(B, HQ, NQ, 7)}, r"key has shape \(2, 2, 5, 8\); wanted \(2, 2, 5, 7\)"),
    (attention, {"key": zeros(B, HKV, NQ)}, r"key has shape \(2, 2, 5\); wanted \(B, Hkv, Nk, D\)"),
    (attention, {"key": zeros(1, HKV, NQ, D)}, r"key has shape \(1, 2, 5, 8\); wanted \(2, 2, 5, 8\)"),
    (attention, {"value": zeros(B, HKV, NQ, D + 1)}, r"value has shape \(2, 2, 5, 9\); wanted \(2, 2, 5, 8\)"),
    (attention, {"value": zeros(B, HKV, NQ + 1, D)}, r"value has shape \(2, 2, 6, 8\)"),
    (attention, {"modality": ids(NQ)}, r"modality has shape \(5,\); wanted \(B, N\)"),
    (attention, {"modality": ids(B, NQ + 1)}, r"modality has shape \(2, 6\); wanted \(2, 5\)"),
    (attention, {"modality": ids(1, NQ)}, r"modality has shape \(1, 5\); wanted \(2, 5\)"),
    (attention, {"query_modality": ids(B, NQ - 1)}, r"query_modality has shape \(2, 4\); wanted \(2, 5\)"),
    (attention, {"sink": zeros(B, HQ)}, r"sink has shape \(2, 4\); wanted \(B\|1, Hq\|1, Nq\)"),
    (attention, {"sink": zeros(B, HKV, NQ)}, r"sink has shape \(2, 2, 5\); wanted .*2\|1, 4\|1, 5"),
    (attention, {"sink": zeros(B, HQ, 1)}, r"sink has shape \(2, 4, 1\)"),
    (attention, {"sink": zeros(B, HQ, NQ), "combine": "split"}, r"sink has shape \(2, 4, 5\); wanted .*Nq, 2\)"),
    (attention, {"sink": zeros(B, HQ, NQ, 1), "combine": "split"}, r"sink has shape \(2, 4, 5, 1\)"),
    (attention, {"modality_bias": zeros(M, M)}, r"modality_bias has shape \(3, 3\); wanted \(B\|1, Hq\|1, M, M\)"),
    (attention, {"modality_bias": zeros(1, 1, M, M + 1)}, r"modality_bias has shape \(1, 1, 3, 4\)"),
    (attention, {"modality_bias": zeros(1, 1, M, 1)}, r"modality_bias has shape \(1, 1, 3, 1\)"),
    (attention, {"modality_bias": zeros(1, HKV, M, M)}, r"modality_bias has shape \(1, 2, 3, 3\)"),
    (attention, {"key_range": ids(B, NQ)}, r"key_range has shape \(2, 5\); wanted \(B\|1, Nq, 2\) = \(2\|1, 5, 2\)"),
    (attention, {"key_range": ids(B, NQ, 3)}, r"key_range has shape \(2, 5, 3\); wanted"),
    (attention, {"key_range": ids(B, NQ + 1, 2)}, r"key_range has shape \(2, 6, 2\); wanted"),
    (attention, {"key_range": ids(3, NQ, 2)}, r"key_range has shape \(3, 5, 2\); wanted"),
    (attention, {"query": zeros(B, HQ, NQ + 2, D)}, r"modality has shape \(2, 5\); wanted .* query_modality .* given"),
    (align, {"key": zeros(B, NQ, D)}, r"key has shape \(2, 5, 8\)"),
    (align, {"value": zeros(B, HKV, NQ, D - 1)}, r"value has shape \(2, 2, 5, 7\); wanted \(2, 2, 5, 8\)"),
    (align, {"modality": ids(B, NQ - 1)}, r"modality has shape \(2, 4\); wanted \(2, 5\)"),
    (align, {"keep": zeros(D, D)}, r"keep has shape \(8, 8\); wanted \(M, 8, 8\) = \(M, D, D\)"),
    (align, {"keep": zeros(M, D, D - 1)}, r"keep has shape \(3, 8, 7\); wanted \(M, 8, 8\)"),
    (align, {"keep": zeros(0, D, D), "modality": ids(B, NQ) - 1}, r"keep has shape \(0, 8, 8\)"),
    (align, {"mix": zeros(M + 1, D, D)}, r"mix has shape \(4, 8, 8\); wanted \(3, 8, 8\)"),
    (align, {"context": ids(B, NQ - 1).bool()}, r"context has shape \(2, 4\)"),
    (align, {"basis": zeros(B, HKV, M, D)}, r"basis has shape \(2, 2, 3, 8\)"),
    (align, {"basis": zeros(B, HKV, M + 1, D, D)}, r"basis has shape \(2, 2, 4, 8, 8\); wanted \(2, 2, 3, 8, 8\)"),
    (sink, {"position": ids(NQ)}, r"position has shape \(5,\)"),
    (sink, {"query_modality": ids(B, NQ + 1)}, r"query_modality has shape \(2, 6\); wanted \(2, 5\)"),
    (sink, {"decay": zeros(M)}, r"decay has shape \(3,\); wanted \(M, Hq\)"),
    (sink, {"base": zeros(M, HQ + 1)}, r"base has shape \(3, 5\); wanted \(3, 4\)"),
]


@pytest.mark.parametrize(("operator", "changed", "message"), SHAPES)
def test_shapes_that_do_not_fit(operator: Callable[..., Any], changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        operator(**changed)
    assert isinstance(caught.value, errors.ModaValueError)
    assert caught.value.variant == "Shape"


@pytest.mark.parametrize("bad", [3, 100, -2, 2**40])
def test_a_modality_out_of_range_is_named(bad: int):
    wrong = ids(B, NQ)
    wrong[1, 2] = bad
    wrong[1, 3] = 99
    table = {"modality_bias": zeros(1, 1, M, M)}
    wanted = re.escape(f"[1, 2] is {bad}; wanted a modality id from -1 (padding) to 2")
    with pytest.raises(errors.ModaValueError, match="^modality" + wanted):
        align(modality=wrong)
    with pytest.raises(errors.ModaValueError, match="^modality" + wanted):
        attention(modality=wrong, **table)
    with pytest.raises(errors.ModaValueError, match="^query_modality" + wanted):
        attention(query_modality=wrong, **table)
    with pytest.raises(errors.ModaValueError, match="^query_modality" + wanted) as caught:
        sink(query_modality=wrong)
    assert caught.value.variant == "Modality"


def test_without_a_table_any_modality_id_goes_but_one_below_padding():
    assert attention(modality=ids(B, NQ) + 200).shape == (B, HQ, NQ, D)
    with pytest.raises(errors.ModaValueError, match=r"modality\[0, 0\] is -2"):
        attention(modality=ids(B, NQ) - 2)


def test_a_given_number_of_modalities_bounds_the_ids():
    assert attention(modality=ids(B, NQ) + 1, num_modalities=2).shape == (B, HQ, NQ, D)
    with pytest.raises(errors.ModaValueError, match=r"modality\[0, 0\] is 2; wanted a modality id from .* to 1"):
        attention(modality=ids(B, NQ) + 2, num_modalities=2)


def numpy_attention(**changed: Any) -> Any:
    array = np.zeros((1, 1, 3, 4), np.float32)
    return N.modular_attention(array, array, array, np.zeros((1, 3), int), **changed)


@pytest.mark.parametrize("operator", [attention, numpy_attention])
def test_a_mass_that_is_not_to_be_had(operator: Callable[..., Any]):
    for mass in ("modal", 1, None):
        with pytest.raises(errors.ModaValueError, match=f'return_mass is {mass!r}; wanted False, True or "modality"'):
            operator(return_mass=mass)
    with pytest.raises(errors.ModaValueError, match="num_modalities is None; wanted the number of modalities, or a"):
        operator(return_mass="modality")
    for count in (2.0, "2", True):
        with pytest.raises(errors.ModaTypeError, match=f"num_modalities is a {type(count).__name__}; wanted an int"):
            operator(return_mass="modality", num_modalities=count)
    for count in (0, -3):
        with pytest.raises(errors.ModaValueError, match=f"num_modalities is {count}; wanted 1 or more"):
            operator(num_modalities=count)


VAST = 2**40


@pytest.mark.parametrize(
    ("operator", "changed"),
    [
        (attention, {"modality": ids(1, 1).expand(B, VAST)}),
        (attention, {"query_modality": ids(1, 1).expand(B, VAST)}),
        (attention, {"key_range": ids(1, 1, 1).expand(B, VAST, 2)}),
        (align, {"modality": ids(1, 1).expand(VAST, NQ)}),
        (align, {"context": ids(1, 1).bool().expand(B, VAST)}),
        (align, {"mix": zeros(1, 1, 1).expand(VAST, D, D)}),
        (sink, {"query_modality": ids(1, 1).expand(B, VAST)}),
    ],
)
def test_a_broadcast_view_of_a_vast_shape_is_refused_unread(operator: Callable[..., Any], changed: dict[str, Any]):
    with pytest.raises(errors.ModaValueError, match=f"has shape .*{VAST}"):
        operator(**changed)


DTYPES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (attention, {"query": zeros(B, HQ, NQ, D).int()}, "query has dtype int32; wanted float16, bfloat16, float32"),
    (attention, {"query": zeros(B, HQ, NQ, D).bool()}, "query has dtype bool"),
    (attention, {"query": zeros(B, HQ, NQ, D).cfloat()}, "query has dtype complex64"),
    (attention, {"query": zeros(B, HQ, NQ, D).to(torch.float8_e4m3fn)}, "query has dtype float8_e4m3fn"),
    (attention, {"query": zeros(B, HQ, NQ, D).double()}, "key has dtype float32; wanted float64"),
    (attention, {"key": zeros(B, HKV, NQ, D).half()}, "key has dtype float16; wanted float32"),
    (attention, {"value": zeros(B, HKV, NQ, D).bfloat16()}, "value has dtype bfloat16; wanted float32"),
    (attention, {"modality": zeros(B, NQ)}, "modality has dtype float32; wanted an integer dtype"),
    (attention, {"modality": zeros(B, NQ).bool()}, "modality has dtype bool; wanted an integer dtype"),
    (attention, {"query_modality": zeros(B, NQ).cfloat()}, "query_modality has dtype complex64"),
    (attention, {"sink": zeros(B, HQ, NQ).double()}, "sink has dtype float64; wanted float32"),
    (attention, {"modality_bias": zeros(1, 1, M, M).half()}, "modality_bias has dtype float16; wanted float32"),
    (attention, {"key_range": zeros(B, NQ, 2)}, "key_range has dtype float32; wanted an integer dtype"),
    (attention, {"key_range": zeros(B, NQ, 2).bool()}, "key_range has dtype bool; wanted an integer dtype"),
    (align, {"key": ids(B, HKV, NQ, D)}, "key has dtype int64"),
    (align, {"value": zeros(B, HKV, NQ, D).half()}, "value has dtype float16; wanted float32"),
    (align, {"keep": zeros(M, D, D).double()}, "keep has dtype float64; wanted float32"),
    (align, {"mix": zeros(M, D, D).half()}, "mix has dtype float16; wanted float32"),
    (align, {"context": ids(B, NQ)}, "context has dtype int64; wanted bool"),
    (align, {"basis": zeros(B, HKV, M, D, D).double()}, "basis has dtype float64; wanted float32"),
    (sink, {"decay": zeros(M, HQ).half()}, "decay has dtype float16; wanted float32 or float64"),
    (sink, {"base": zeros(M, HQ).double()}, "base has dtype float64; wanted float32"),
    (sink, {"position": zeros(B, NQ)}, "position has dtype float32; wanted an integer dtype"),
]


@pytest.mark.parametrize(("operator", "changed", "message"), DTYPES)
def test_dtypes_that_are_mixed_or_not_supported(operator: Callable[..., Any], changed: dict[str, Any], message: str):
    with pytest.raises(TypeError, match=message) as caught:
        operator(**changed)
    assert isinstance(caught.value, errors.ModaTypeError)
    assert caught.value.variant == "DType"


OPTIONS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (attention, {"combine": "both"}, 'combine is "both"; wanted "joint" or "split"'),
    (attention, {"scale": float("nan")}, "scale is NaN; wanted a finite number"),
    (attention, {"scale": float("inf")}, "scale is inf"),
    (attention, {"num_modalities": 257}, "num_modalities is 257; wanted 1 to 256"),
    (
        attention,
        {"num_modalities": 2, "modality_bias": zeros(1, 1, M, M)},
        "num_modalities is 2; wanted 3, the M of modality_bias",
    ),
    (align, {"kind": "cov"}, 'kind is "cov"; wanted "gram" or "covariance"'),
    (align, {"eps": -1e-6}, "eps is -0.000001; wanted a finite number >= 0"),
    (align, {"eps": float("nan")}, "eps is NaN"),
    (sink, {"span": -1}, "span is -1; wanted"),
]


@pytest.mark.parametrize(("operator", "changed", "message"), OPTIONS)
def test_options_that_do_not_exist(operator: Callable[..., Any], changed: dict[str, Any], message: str):
    with pytest.raises(errors.ModaValueError, match=re.escape(message)) as caught:
        operator(**changed)
    assert caught.value.variant == "Option"


TENSORS = {
    attention: ("query", "key", "value", "modality"),
    align: ("key", "value", "modality", "keep", "mix"),
    sink: ("position", "query_modality", "decay", "base"),
}
OPTIONAL = {attention: ("query_modality", "sink", "modality_bias", "key_range"), align: ("context", "basis"), sink: ()}


@pytest.mark.parametrize("operator", TENSORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("thing", [[[1.0]], None, 3.0, np.zeros((1, 2))], ids=lambda x: type(x).__name__)
def test_what_is_not_a_tensor(operator: Callable[..., Any], thing: object):
    names = TENSORS[operator] + (OPTIONAL[operator] if thing is not None else ())
    for name in names:
        with pytest.raises(errors.ModaTypeError, match=f"{name} is a {type(thing).__name__}; wanted a torch.Tensor"):
            operator(**{name: thing})


@pytest.mark.parametrize("operator", TENSORS, ids=lambda f: f.__name__)
def test_tensors_on_different_devices(operator: Callable[..., Any]):
    first = TENSORS[operator][0]
    for name in TENSORS[operator][1:] + OPTIONAL[operator]:
        elsewhere = torch.zeros(1, device="meta")
        with pytest.raises(errors.ModaValueError, match=f"{name} is on device meta; wanted cpu, the device of {first}"):
            operator(**{name: elsewhere})


def test_a_device_without_a_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(1, 1, 2, 4, device="xpu")
    with pytest.raises(errors.ModaValueError, match="query is on device xpu:0; wanted cpu"):
        F.modular_attention(query, query, query, query)


@pytest.mark.parametrize("span", [2.5, True, "9", None])
def test_a_span_that_is_no_int(span: object):
    with pytest.raises(errors.ModaTypeError, match=f"span is a {type(span).__name__}; wanted an int"):
        sink(span=span)


def test_inputs_are_untouched_by_a_failing_call():
    query = torch.randn(B, HQ, NQ, D)
    before = query.clone()
    with pytest.raises(errors.ModaValueError):
        attention(query=query, modality=ids(B, NQ) - 5)
    assert torch.equal(query, before)


def test_a_panic_is_an_exception_and_the_process_lives():
    with pytest.raises(RuntimeError, match="internal error in moda-attn, please report it: the moon fell") as caught:
        _native._panic_for_test("the moon fell")
    assert isinstance(caught.value, errors.ModaRuntimeError)
    assert attention().shape == (B, HQ, NQ, D)


def test_a_failed_allocation_is_an_exception_and_the_process_lives():
    with pytest.raises(MemoryError, match=f"could not allocate {2**60} bytes for a test") as caught:
        _native._allocate_for_test(2**60)
    assert isinstance(caught.value, errors.ModaMemoryError)
    assert attention().shape == (B, HQ, NQ, D)


STARVED = """
import gc, resource, torch
from moda_attn import functional as F

torch.set_num_threads(1)
query, ids = torch.randn(1, 32, 800, 64), torch.zeros(1, 800, dtype=torch.long)
key = torch.randn(1, 1, 800, 64, requires_grad=True)
before = query.clone(), key.detach().clone()
# Once with room for everything, so that all of torch that is imported at need is there.
F.modular_attention(query, key, key, ids).sum().backward()
key.grad = None
failed = 0
for megabytes in range(2, 32, 2):
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))
    try:
        F.modular_attention(query, key, key, ids).sum().backward()
    except (MemoryError, RuntimeError):
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    key.grad = None
    gc.collect()
assert torch.equal(query, before[0]) and torch.equal(key, before[1])
F.modular_attention(query, key, key, ids).sum().backward()
print("fine", failed > 0)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="needs Linux to limit the address space to what is used"
)
def test_the_process_lives_when_memory_runs_out_anywhere_in_a_call():
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.strip() == "fine True", done.stderr


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MODA_ATTN_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


ASK = """
import numpy, moda_attn
from moda_attn import errors, numpy as N
q = numpy.ones((1, 1, 2, 4), numpy.float32)
ids = numpy.zeros((1, 2), numpy.int8)
for call in (lambda: N.modular_attention(q, q, q, ids), lambda: N.duplex_align(q, q, ids, q[0, :, :1], q[0, :, :1])):
    try:
        call()
    except errors.ModaError as error:
        print(error.variant, type(error).__name__, error)
print(moda_attn.explain())
"""


def test_an_instruction_set_that_cannot_be_had():
    done = run_with_isa("sse9", ASK)
    first, *rest = done.stdout.splitlines()
    assert first.startswith(
        'InstructionSet ModaRuntimeError MODA_ATTN_ISA asks for "sse9"; this machine and build offer scalar'
    ), done
    assert any("every call raises" in line for line in rest)


def test_every_instruction_set_there_is_can_be_had():
    for isa in moda_attn.build_info()["isa_available"]:
        done = run_with_isa(isa, "import moda_attn; i = moda_attn.build_info(); print(i['isa'], i['isa_reason'])")
        assert done.stdout.strip() == f"{isa} MODA_ATTN_ISA asks for it", done.stderr


def numpy_list() -> None:
    N.modular_attention([1.0], [1.0], [1.0], [0])


class OnCuda:
    """A foreign array of another device."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **_):
        raise AssertionError("the device comes first")


def driver_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA driver")
    _native.cuda_check(0)


# One way to raise every error; test_every_error_has_a_case keeps it complete.
CASES: dict[str, Callable[[], Any]] = {
    "Shape": lambda: attention(query=zeros(1)),
    "Modality": lambda: align(modality=ids(B, NQ) + 7),
    "Option": lambda: attention(combine="both"),
    "DType": lambda: attention(query=zeros(B, HQ, NQ, D).int()),
    "Device": lambda: _native.describe("query", OnCuda()),
    "NotATensor": numpy_list,
    "DriverMissing": driver_missing,
    # From here on each is printed by a process with an environment of its own.
    "InstructionSet": lambda: run_with_isa("sse9", ASK).stdout,
    **{variant: partial(fake_gpu.fail, variant) for variant in fake_gpu.FAILURES},
    "Allocation": lambda: _native._allocate_for_test(2**60),
    "Panic": lambda: _native._panic_for_test("a test"),
}


def test_every_error_has_a_case():
    assert {error["name"] for error in moda_attn.list_errors()} == set(CASES)


@pytest.mark.parametrize("error", moda_attn.list_errors(), ids=lambda error: error["name"])
def test_every_error_is_raised_as_the_class_it_is_listed_with(error: dict[str, str]):
    kind = getattr(errors, error["exception"])
    assert issubclass(kind, errors.ModaError)
    assert error["message"]
    case = CASES[error["name"]]
    if error["name"] in ("InstructionSet", *fake_gpu.FAILURES):
        assert case().startswith(f"{error['name']} {error['exception']} ")
        return
    with pytest.raises(kind) as caught:
        case()
    assert type(caught.value) is kind
    assert caught.value.variant == error["name"]
