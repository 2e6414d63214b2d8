"""The race: no time is taken before the parity gate is green; medians of interleaved runs; ratios against each peer."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ModaRuntimeError
from .machine import describe
from .memory import peak_memory, peak_memory_in_a_fresh_process
from .peers import PEERS, dense, make_inputs, moda_attn

SHAPES = ("1,32,8,1024,128", "1,32,8,2048,128", "2,16,16,1024,64")
# Relative L2 against float64: (output, gradients).
TOLERANCES = {"float64": (1e-12, 1e-11), "float32": (2e-6, 1e-5), "bfloat16": (1e-2, 2e-2), "float16": (2e-3, 4e-3)}
GATE_SHAPE = (1, 8, 2, 300, 64)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the race and prints it; ``--record FILE`` also writes it as JSON."""
    options = _parser().parse_args(argv)
    if options.peak_of:
        print(json.dumps(peak_memory(options.peak_of)))
        return 0
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"machine": describe(), "parity": {}, "times_ms": [], "memory_mib": []}
    print(f"{record['machine']['cpu']}, {options.threads} threads, kernels: {record['machine']['isa']}")
    for dtype in options.dtype:
        record["parity"][dtype] = gate(dtype)
        errors = ", ".join(f"{name} {error:.1e}" for name, error in record["parity"][dtype].items())
        print(f"\n{dtype}: parity with the dense float64 evaluation is green ({errors})")
        for shape in options.shape:
            for backward in (False, True):
                times = race(shape, dtype, backward=backward, repeat=options.repeat)
                record["times_ms"].append({"dtype": dtype, "shape": shape, "backward": backward, **times})
                _print_times(shape, backward, times)
    if options.memory:
        print("\npeak memory of forward + backward above the inputs, B 1, Hq 32, Hkv 8, D 128, float32")
        for tokens in (2048, 4096, 8192):
            used = peak_memory_in_a_fresh_process(f"1,32,8,{tokens},128")
            record["memory_mib"].append({"tokens": tokens, **used})
            print(f"  N {tokens:5d}  {used['mib']:8.0f} MiB  {used['mib'] * 1024 / tokens:6.1f} KiB a token")
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def gate(dtype: str) -> dict[str, float]:
    """Relative L2 errors of output and gradients against float64; raises where one exceeds its tolerance."""
    inputs = make_inputs(GATE_SHAPE, getattr(torch, dtype), backward=True)
    exact = inputs.to(torch.float64)
    names = ("output", "query", "key", "value", "keep", "mix", "sink", "bias")
    got, wanted = _with_gradients(moda_attn, inputs), _with_gradients(dense, exact)
    errors = {}
    for name, ours, truth in zip(names, got, wanted, strict=True):
        errors[name] = float((ours.double() - truth).norm() / truth.norm())
        allowed = TOLERANCES[dtype][name != "output"]
        if not errors[name] <= allowed:
            raise ModaRuntimeError(f"parity of {name} in {dtype}: relative error {errors[name]:.2e}, allowed {allowed}")
    return errors


def race(shape: str, dtype: str, *, backward: bool, repeat: int) -> dict[str, float]:
    """Median milliseconds of every peer, their runs interleaved so that a machine's drift meets all alike."""
    sizes = tuple(int(size) for size in shape.split(","))
    inputs = make_inputs(sizes, getattr(torch, dtype), backward=backward)
    runs = {name: _run(peer, inputs, backward) for name, peer in PEERS.items()}
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(times), 3) for name, times in taken.items()}


def _run(peer: Callable[[Any], torch.Tensor], inputs: Any, backward: bool) -> Callable[[], None]:
    def forward_and_backward() -> None:
        peer(inputs).backward(inputs.upstream)
        for leaf in inputs.leaves:
            leaf.grad = None

    @torch.no_grad()
    def forward() -> None:
        peer(inputs)

    return forward_and_backward if backward else forward


def _with_gradients(function: Callable[[Any], torch.Tensor], inputs: Any) -> list[torch.Tensor]:
    out = function(inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.upstream)]


def _print_times(shape: str, backward: bool, times: dict[str, float]) -> None:
    ours = times["moda_attn"]
    row = "   ".join(f"{name} {taken:8.1f} ms ({taken / ours:4.2f}x)" for name, taken in times.items())
    print(f"  B,Hq,Hkv,N,D {shape:16s} {'forward + backward' if backward else 'forward':18s} {row}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moda-attn bench", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCES, default=["float32", "bfloat16"])
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="B,Hq,Hkv,N,D")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs of each peer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="also measure peak memory at N 2048, 4096, 8192")
    parser.add_argument("--record", type=Path, help="write the results to this JSON file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser
