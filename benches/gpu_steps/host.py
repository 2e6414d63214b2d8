"""Host time of the first call, which compiles, and of later ones; forward and backward in a CUDA graph and compiled."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpu_steps import Result, run
from moda_attn.bench import peers

#: Goals: the first call of one kernel, and a later call, on the host.
FIRST_SECONDS, LATER_MICROSECONDS = 2.0, 20.0
SAME = "same bits"


def host(device: str, quick: bool) -> Iterator[Result]:
    """Seconds of a first call, microseconds of later ones, and whether a graph and compiled code give the same bits."""
    os.environ["MODA_ATTN_CACHE"] = ""  # kernels are compiled anew, whatever other steps have left
    x = peers.make_inputs((1, 8, 2, 256, 128), torch.bfloat16, backward=False, device=device)
    calls: dict[str, Callable[[], Tensor]] = {
        "duplex_align": lambda: _align(x),
        "modular_attention": lambda: _attend(x),
    }
    first: dict[str, float] = {}
    later: dict[str, float] = {}
    result: Result = {"first_s": first, "later_us": later}
    with torch.no_grad():
        for name, call in calls.items():
            first[name] = _seconds(call, 1, device)
            yield result
        for name, call in calls.items():
            _seconds(call, 20, device)
            later[name] = 1e6 * _seconds(call, 50 if quick else 200, device)
            yield result
    checks = {"compile": _compiled} if device == "cpu" else {"graph": _graph, "compile": _compiled}
    for name, check in checks.items() if not quick else ():
        try:
            result[name] = check(peers.make_inputs((1, 8, 2, 256, 128), torch.bfloat16, backward=True, device=device))
        except Exception:  # the next one is of interest all the same
            result[name] = traceback.format_exc()
        yield result
    told = ", ".join(f"{name} {first[name]:.2f} s, then {later[name]:.1f} us" for name in calls)
    ends = {name: result[name].strip().splitlines()[-1] for name in checks if name in result}
    # Each operator compiles several kernels at its first call; the goals hold for one.
    good = all(end == SAME for end in ends.values())
    good &= device == "cpu" or max(later.values()) <= LATER_MICROSECONDS
    summary = "; ".join([told, *(f"{name}: {end}" for name, end in ends.items())])
    yield {**result, "outcome": "passed" if good else "failed", "summary": summary}


def _align(x: peers.Inputs) -> Tensor:
    return peers.functional.duplex_align(x.key, x.value, x.modality, x.keep, x.mix)[0]


def _attend(x: peers.Inputs) -> Tensor:
    return peers.functional.modular_attention(
        x.query, x.key, x.value, x.modality, sink=x.sink, modality_bias=x.bias, num_modalities=2
    )


def _seconds(call: Callable[[], object], count: int, device: str) -> float:
    """Seconds of the host a call, none of the device's waiting."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    taken = (time.perf_counter() - start) / count
    if device == "cuda":
        torch.cuda.synchronize()
    return taken


def _step(peer: peers.Peer, x: peers.Inputs) -> list[Tensor]:
    """The output and the gradients of all leaves."""
    out = peer(x)
    return [out, *torch.autograd.grad(out, x.leaves, x.upstream)]


def _verdict(plain: list[Tensor], others: list[Tensor]) -> str:
    odd = [name for name, a, b in zip(range(len(plain)), plain, others, strict=True) if not torch.equal(a, b)]
    return f"OTHER bits in results {odd}" if odd else SAME


def _graph(x: peers.Inputs) -> str:
    plain = _step(peers.moda_attn, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(peers.moda_attn, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(peers.moda_attn, x)
    for tensor in captured:
        tensor.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    return _verdict(plain, captured)


def _compiled(x: peers.Inputs) -> str:
    return _verdict(_step(peers.moda_attn, x), _step(torch.compile(peers.moda_attn, fullgraph=True), x))


if __name__ == "__main__":
    run(host)
