"""A call past torch's dispatcher: where it is taken, that nothing differs by it, and who still sees every operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moda_attn import _native, _op
from moda_attn import functional as F
from moda_attn._operator import Operator
from problems import Case, align_problem, attention_problem, sink_problem

CASE = Case(length=9, batch=2, heads=4, kv_heads=2, dim=8, modalities=3, padding="left")
SPLIT = Case(length=7, dim=8, combine="split", sink="shared")
PROBLEMS: dict[str, dict[str, Any]] = {
    "duplex_align": align_problem(CASE, torch.float32),
    "pseudo_sink": sink_problem(CASE, torch.float32, span=20),
    "modular_attention": attention_problem(CASE, torch.float32) | {"return_mass": True},
}
EVERY = pytest.mark.parametrize("name", PROBLEMS)
QUERY, IDS = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1, 1, 0, -1]])


def self_attention(query: Tensor, **options: Any) -> Tensor:
    return F.modular_attention(query, query, query, IDS, **options)


def differentiated(problem: dict[str, Any], operator: Callable[..., Any]) -> tuple[Tensor, ...]:
    """The operator's results, then the gradients of everything that has one."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in problem.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    results = operator(**problem | leaves)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [result for result in results if result.requires_grad]
    upstream = [torch.linspace(-1, 1, result.numel()).view(result.shape) for result in wanted]
    return (*results, *torch.autograd.grad(wanted, list(leaves.values()), upstream))


class Listening(TorchDispatchMode):
    """Notes the operators that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@EVERY
def test_a_plain_call_goes_past_the_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch):
    """Without gradients and with them: a direct call that failed would be dispatched, and only be slow."""

    def refuse(*_: Any) -> None:
        pytest.fail("dispatched")

    for operator in vars(_op).values():
        if isinstance(operator, Operator):
            monkeypatch.setattr(operator, "_dispatched", refuse)
    getattr(F, name)(**PROBLEMS[name])
    differentiated(PROBLEMS[name], getattr(F, name))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *PROBLEMS.items(),
        ("duplex_align", align_problem(CASE, torch.bfloat16)),
        ("modular_attention", attention_problem(CASE, torch.bfloat16)),
        ("modular_attention", attention_problem(SPLIT, torch.float64)),
    ],
)
def test_dispatched_and_direct_calls_have_the_same_bits(name: str, problem: dict[str, Any]):
    direct = differentiated(problem, getattr(F, name))
    with Listening() as mode:
        dispatched = differentiated(problem, getattr(F, name))
    assert f"moda_attn.{name}.default" in mode.seen
    assert f"moda_attn.{name}_backward.default" in mode.seen
    assert len(direct) == len(dispatched)
    for at, (one, other) in enumerate(zip(direct, dispatched, strict=True)):
        assert torch.equal(one, other), at
        assert (one.dtype, one.stride(), one.requires_grad) == (other.dtype, other.stride(), other.requires_grad), at


def test_without_gradients_the_logsumexp_is_not_made(monkeypatch: pytest.MonkeyPatch):
    given, real = [], _native.attend_forward
    monkeypatch.setattr(_native, "attend_forward", lambda *inputs: given.append(inputs[-5:-1]) or real(*inputs))
    plain = self_attention(QUERY)
    wished = self_attention(QUERY.clone().requires_grad_())
    assert torch.equal(plain, wished)
    assert [[tensor is not None for tensor in outputs] for outputs in given] == [
        [True, False, False, False],
        [True, True, False, False],
    ]


# Whoever listens.


@EVERY
def test_modes_see_every_operator(name: str):
    with Listening() as mode:
        getattr(F, name)(**PROBLEMS[name])
    assert f"moda_attn.{name}.default" in mode.seen

    class Functions(TorchFunctionMode):
        seen = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Functions.seen |= func is getattr(torch.ops.moda_attn, name).default
            return func(*args, **(kwargs or {}))

    with Functions():
        getattr(F, name)(**PROBLEMS[name])
    assert Functions.seen


@EVERY
def test_a_profiler_sees_every_operator(name: str):
    with torch.autograd.profiler.profile() as profile:
        getattr(F, name)(**PROBLEMS[name])
    assert f"moda_attn::{name}" in {event.name for event in profile.function_events}


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_trace_holds_the_operator_and_not_its_result():
    traced = torch.jit.trace(self_attention, (QUERY,))
    assert "moda_attn::modular_attention" in str(traced.graph)
    assert torch.equal(traced(2 * QUERY), self_attention(2 * QUERY))


def test_fake_tensors_stay_fake():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = self_attention(mode.from_tensor(QUERY))
    assert mode.is_our_fake(out)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_tensors_are_not_taken_for_plain_ones():
    queries = torch.stack([QUERY, 2 * QUERY])
    assert torch.equal(torch.vmap(self_attention)(queries), torch.stack([self_attention(query) for query in queries]))


def test_a_subclass_keeps_its_word():
    class Named(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls += func is torch.ops.moda_attn.modular_attention.default
            return super().__torch_function__(func, types, args, kwargs or {})

    out = self_attention(QUERY.as_subclass(Named))
    assert (Named.calls, type(out)) == (1, Named)
    assert torch.equal(out.as_subclass(Tensor), self_attention(QUERY))


# Errors: those of the dispatcher, whichever way a call takes.


BAD: dict[str, Callable[[], Any]] = {
    "sparse": lambda: self_attention(QUERY.to_sparse()),
    "mkldnn": lambda: F.modular_attention(QUERY.to_mkldnn(), QUERY, QUERY, IDS),
    "a bool that is none": lambda: self_attention(QUERY, is_causal="yes"),
    "a scale that is none": lambda: self_attention(QUERY, scale="large"),
    "a name that is none": lambda: self_attention(QUERY, combine=3),
    "a name that is unknown": lambda: self_attention(QUERY, combine="both"),
    "an id": lambda: F.modular_attention(QUERY, QUERY, QUERY, IDS - 1),
    "a dtype": lambda: self_attention(QUERY.int()),
    "a shape": lambda: F.modular_attention(QUERY, QUERY[:, :, 1:], QUERY, IDS),
    "a span": lambda: F.pseudo_sink(IDS, IDS, 2**70, torch.ones(2, 2), torch.ones(2, 2)),
    "an eps": lambda: F.duplex_align(QUERY, QUERY, IDS, torch.eye(8)[None], torch.eye(8)[None], eps=-1.0),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("wished", [False, True])
def test_errors_do_not_depend_on_the_way(bad: str, wished: bool):
    caught = []
    for around in (contextlib.nullcontext(), Listening()):
        with torch.set_grad_enabled(wished), around, pytest.raises(Exception) as error:  # noqa: PT011
            BAD[bad]()
        caught.append((type(error.value), str(error.value)))
    assert caught[0] == caught[1]


def test_what_the_dispatcher_makes_readable_is_read():
    zeros = torch._efficientzerotensor(QUERY.shape)
    assert torch.equal(F.modular_attention(zeros, QUERY, QUERY, IDS), F.modular_attention(0 * QUERY, QUERY, QUERY, IDS))
