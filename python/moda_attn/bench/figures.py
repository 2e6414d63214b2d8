"""What is measured beside the races, and the goals: one list of single numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import _native, functional
from .memory import peak_memory, results
from .peers import PEERS, Inputs, make_inputs, moda_attn
from .process import in_a_fresh_process
from .timing import interleaved

#: B, Hq, Hkv, N, D of what is measured, where nothing else is said.
SHAPE = (1, 32, 8, 2048, 128)
#: How long a register loop runs, seconds.
LOOP = 0.05


@dataclass(frozen=True)
class Figure:
    """One number. `measure` takes threads and samples, and gives None where this machine has no such thing."""

    section: str
    name: str
    unit: str
    measure: Callable[[int, int], float | None]
    at_least: float | None = None
    at_most: float | None = None
    quick: bool = False

    @property
    def goal(self) -> str:
        """The goal in words; empty where there is none."""
        if self.at_least is not None:
            return f"at least {self.at_least:g} {self.unit}"
        return "" if self.at_most is None else f"at most {self.at_most:g} {self.unit}"

    def met(self, value: float | None) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        if value is None or self.at_least is self.at_most:
            return None
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0)


def _align(x: Inputs) -> object:
    return functional.duplex_align(x.key, x.value, x.modality, x.keep, x.mix)


def _share_of_alignment(dtype: str) -> Callable[[int, int], float]:
    @torch.no_grad()
    def measure(threads: int, samples: int) -> float:
        torch.set_num_threads(threads)
        x = make_inputs(SHAPE, getattr(torch, dtype), backward=False)
        taken = interleaved({"all": lambda: moda_attn(x), "align": lambda: _align(x)}, samples)
        return 100 * taken["align"] / taken["all"]

    return measure


def _gain_of_threads(dtype: str, *, backward: bool) -> Callable[[int, int], float | None]:
    def measure(threads: int, samples: int) -> float | None:
        if threads < 2:
            return None
        x = make_inputs(SHAPE, getattr(torch, dtype), backward=backward)

        def on(count: int) -> Callable[[], None]:
            def run() -> None:
                torch.set_num_threads(count)
                out = moda_attn(x)
                if backward:
                    torch.autograd.grad(out, x.leaves, x.upstream)

            return run

        taken = interleaved({"one": on(1), "two": on(2)}, samples)
        torch.set_num_threads(threads)
        return taken["one"] / taken["two"]

    return measure


def _efficiency(dtype: str) -> Callable[[int, int], float]:
    @torch.no_grad()
    def measure(threads: int, samples: int) -> float:
        torch.set_num_threads(threads)
        x = make_inputs(SHAPE, getattr(torch, dtype), backward=False)
        rates, seconds = [], []
        for _ in range(samples):
            seconds.append(interleaved({"all": lambda: moda_attn(x)}, 1)["all"])
            rates.append(_native._product_rate(dtype, threads, LOOP))
        return 100 * _operations(SHAPE) / statistics.median(seconds) / statistics.median(rates)

    return measure


def _ceiling(dtype: str) -> Callable[[int, int], float]:
    def measure(threads: int, samples: int) -> float:
        return statistics.median(_native._product_rate(dtype, threads, LOOP) for _ in range(samples)) / 1e9

    return measure


def _operations(shape: tuple[int, ...]) -> float:
    """Floating point operations of the full operator's products, causal: scores and outputs, basis, keep and mix."""
    batch, query_heads, key_heads, tokens, dim = shape
    attention = 2 * query_heads * tokens * (tokens + 1) * dim
    alignment = 6 * key_heads * tokens * dim * dim
    return batch * (attention + alignment)


def _overhead(call: Callable[[Inputs], object]) -> Callable[[int, int], float]:
    @torch.no_grad()
    def measure(threads: int, samples: int) -> float:
        torch.set_num_threads(threads)
        x = make_inputs((1, 1, 1, 1, 16), torch.float32, backward=False)
        return 1e6 * interleaved({"call": lambda: call(x)}, samples)["call"]

    return measure


def _attend(x: Inputs) -> object:
    return functional.modular_attention(x.query, x.key, x.value, x.modality, sink=x.sink, modality_bias=x.bias)


def _peak(peer: str, tokens: int) -> Callable[[int, int], float]:
    def measure(threads: int, samples: int) -> float:
        return in_a_fresh_process({}, peak_memory, peer, (1, 32, 8, tokens, 128), threads)

    return measure


def _beyond_results(tokens: int) -> Callable[[int, int], float]:
    def measure(threads: int, samples: int) -> float:
        return _peak("moda_attn", tokens)(threads, samples) - results((1, 32, 8, tokens, 128))

    return measure


def _figures() -> list[Figure]:
    figures = [
        Figure("alignment", f"alignment in a {dtype} forward", "%", _share_of_alignment(dtype), at_most=8, quick=True)
        for dtype in ("float32", "bfloat16")
    ]
    figures += [
        Figure("threads", f"two threads, {dtype} {kind}", "x", _gain_of_threads(dtype, backward=backward), 1.85)
        for dtype in ("float32", "bfloat16")
        for kind, backward in (("forward", False), ("forward + backward", True))
    ]
    for dtype in ("float32", "bfloat16"):
        ceiling, share = f"register loop of {dtype} products", f"{dtype} forward of that loop's rate"
        figures.append(Figure("efficiency", ceiling, "GFLOP/s", _ceiling(dtype), quick=True))
        figures.append(Figure("efficiency", share, "%", _efficiency(dtype), 72, quick=True))
    for name, call in (("duplex_align", _align), ("modular_attention", _attend)):
        figures.append(Figure("overhead", f"{name} of one token and head", "us", _overhead(call), at_most=15))
    for tokens in (2048, 8192):
        for peer in PEERS:
            if peer != "eager_moda" or tokens <= 2048:
                figures.append(Figure("memory", f"{peer}, N {tokens}", "MiB", _peak(peer, tokens)))
        figures.append(Figure("memory", f"moda_attn beyond results, N {tokens}", "MiB", _beyond_results(tokens)))
    return figures


FIGURES: tuple[Figure, ...] = tuple(_figures())
