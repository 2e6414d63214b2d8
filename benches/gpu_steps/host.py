"""Host time of the first call, which compiles, and of later ones; both operators inside a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from gpu_steps import Result, run
from moda_attn.bench import peers

#: Goals: the first call of one kernel, and a later call, on the host.
FIRST_SECONDS, LATER_MICROSECONDS = 2.0, 20.0


def host(device: str, quick: bool) -> Result:
    """Seconds of a first call, microseconds of later ones, and whether a replayed graph gives the same bits."""
    x = peers.make_inputs((1, 8, 2, 256, 128), torch.bfloat16, backward=False, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    calls: dict[str, Callable[[], Tensor]] = {
        "duplex_align": lambda: _align(x),
        "modular_attention": lambda: _attend(x),
    }
    first, later = {}, {}
    with torch.no_grad():
        for name, call in calls.items():
            first[name] = _seconds(call, 1)
            wait()
        for name, call in calls.items():
            _seconds(call, 20)
            wait()
            later[name] = 1e6 * _seconds(call, 50 if quick else 200)
            wait()
        graph = _graph(x) if device == "cuda" else "needs a GPU"
    told = ", ".join(f"{name} {first[name]:.2f} s, then {later[name]:.1f} us" for name in calls)
    # Each operator compiles several kernels at its first call; the goals hold for one.
    good = device == "cpu" or (graph == "same bits" and max(later.values()) <= LATER_MICROSECONDS)
    return {
        "outcome": "passed" if good else "failed",
        "first_s": first,
        "later_us": later,
        "graph": graph,
        "summary": f"{told}; graph: {graph}",
    }


def _align(x: peers.Inputs) -> Tensor:
    return peers.functional.duplex_align(x.key, x.value, x.modality, x.keep, x.mix)[0]


def _attend(x: peers.Inputs) -> Tensor:
    return peers.functional.modular_attention(
        x.query, x.key, x.value, x.modality, sink=x.sink, modality_bias=x.bias, num_modalities=2
    )


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _graph(x: peers.Inputs) -> str:
    plain = peers.moda_attn(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        peers.moda_attn(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = peers.moda_attn(x)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return "same bits" if torch.equal(plain, captured) else "OTHER bits"


if __name__ == "__main__":
    run(host)
