"""The race: bfloat16, D 128, causal, grouped heads; ours is the full operator, behind a parity gate."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_steps import Result, run
from moda_attn.bench import decoding, peers
from moda_attn.bench.cases import Race
from moda_attn.bench.gate import gate
from moda_attn.bench.timing import interleaved

LENGTHS = (2048, 4096, 16384)
#: Longest sequence whose gradients are compared with a dense float64 evaluation; longer ones rely on this one.
LONGEST_GRADIENTS = 4096
#: Cycles that the device sleeps before a round, some 15 ms: the host makes its launches ahead, so none is waited for.
AHEAD = 25_000_000
#: The least that a peer's time over ours may be.
GOALS = {"flex_moda": 1.0, "eager_moda": 10.0, "sdpa_flash": 0.6}


def races(quick: bool) -> list[Race]:
    """The rows."""
    if quick:
        return [Race("gpu", "bfloat16", (1, 4, 1, 128, 64), backward=backward) for backward in (False, True)]
    rows = [Race("gpu", "bfloat16", (1, 32, 8, n, 128), backward=b) for n in LENGTHS for b in (False, True)]
    decode = [Race("gpu", "bfloat16", (batch, 32, 8, 8192, 128), decode=True) for batch in (1, 8)]
    return [*rows[:4], *decode, *rows[4:]]  # the longest ones last: they cost the most


def race(device: str, quick: bool) -> Iterator[Result]:
    """Row by row; peers that cannot run are named with the reason, rows where we cannot with the whole of it."""
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        one.name: (lambda one=one: _row(one, device, quick)) for one in races(quick)
    }
    for n in (128,) if quick else LENGTHS[1:]:
        todo[f"align {n}"] = lambda n=n: _align_row(n, device, quick)
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for name, measure in todo.items():
        try:
            rows.append(measure())
        except Exception:  # the other rows are of interest all the same
            failures[name] = traceback.format_exc()
        yield _result(rows, failures, device)


def _result(rows: list[dict[str, Any]], failures: dict[str, str], device: str) -> Result:
    missed = [
        f"{row['name']}: {peer} {row['times_ms'][peer] / row['times_ms']['moda_attn']:.2f}, goal {goal}"
        for row in rows
        for peer, goal in GOALS.items()
        if device == "cuda" and row["raced"] and peer in row["times_ms"]
        if row["times_ms"][peer] / row["times_ms"]["moda_attn"] < goal
    ]
    summary = f"{len(rows)} rows, {len(missed)} goals missed, {len(failures)} rows failed"
    result = {"rows": rows, "missed": missed, "failures": failures, "summary": summary}
    return {**result, "outcome": "failed"} if failures else result


def _row(one: Race, device: str, quick: bool) -> dict[str, Any]:
    batch, heads, _, tokens, dim = one.shape
    measurable = not one.backward or tokens <= LONGEST_GRADIENTS
    parity = gate(one, device) if measurable else gate(Race("gpu", one.dtype, one.shape), device)
    if one.decode:
        step = decoding.make_step(one.shape, torch.bfloat16, device=device)
        candidates: dict[str, Callable[[], object]] = {
            name: (lambda peer=peer: peer(step)) for name, peer in decoding.PEERS.items()
        }
        products = 4.0 * batch * heads * tokens * dim
    else:
        x = peers.make_inputs(one.shape, torch.bfloat16, backward=one.backward, device=device)
        candidates = {name: _call(peer, x, one.backward) for name, peer in _peers(x, device).items()}
        products = 2.0 * batch * heads * tokens**2 * dim * (3.5 if one.backward else 1)
    times, missing = _times(candidates, device, gradients=one.backward, quick=quick)
    return {
        "name": one.name,
        "raced": not one.decode,
        "times_ms": times,
        "missing": missing,
        "tflops": round(products / times["moda_attn"] / 1e9, 2),
        "parity": {name: float(f"{error:.3g}") for name, error in parity.items()},
    }


def _align_row(tokens: int, device: str, quick: bool) -> dict[str, Any]:
    shape = (1, 32, 8, tokens, 64 if quick else 128)
    x = peers.make_inputs(shape, torch.bfloat16, backward=False, device=device)
    operator = peers.functional.duplex_align
    ours = {
        "moda_attn": lambda: operator(x.key, x.value, x.modality, x.keep, x.mix),
        "eager_align": lambda: peers._eager_align(x),
    }
    times, missing = _times(ours, device, gradients=False, quick=quick)
    products = 6.0 * shape[2] * tokens * shape[4] ** 2
    name = f"bfloat16 align {','.join(map(str, shape))}"
    tflops = round(products / times["moda_attn"] / 1e9, 2)
    return {"name": name, "raced": False, "times_ms": times, "missing": missing, "tflops": tflops, "parity": {}}


def _call(peer: peers.Peer, x: peers.Inputs, backward: bool) -> Callable[[], object]:
    def forward_and_backward() -> None:
        peer(x).backward(x.upstream)
        for leaf in x.leaves:
            leaf.grad = None

    return forward_and_backward if backward else lambda: peer(x)


def _peers(x: peers.Inputs, device: str) -> dict[str, peers.Peer]:
    known = dict(peers.PEERS)
    if device == "cpu":
        return known
    del known["sdpa"]
    kinds = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
    return known | {name: _only(backend) for name, backend in kinds.items()} | {"flex_moda": _flex(x)}


def _only(backend: SDPBackend) -> peers.Peer:
    def sdpa(x: peers.Inputs) -> Tensor:
        with sdpa_kernel(backend):
            return torch_functional.scaled_dot_product_attention(
                x.query, x.key, x.value, is_causal=True, enable_gqa=True
            )

    return sdpa


def _flex(x: peers.Inputs) -> peers.Peer:
    """FlexAttention: the bias as its score_mod, the sink from its logsumexp. Compiled at the first call."""
    modality, bias, tokens = x.modality, x.bias, x.query.shape[2]

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return value + bias[0, h, modality[b, i], modality[b, j]]

    @cache
    def compiled() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        torch._dynamo.reset()  # it gives up on a function that it has compiled for a few shapes
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=x.query.device)
        options = {"score_mod": score, "block_mask": mask, "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
        return partial(torch.compile(flex_attention, dynamic=False), **options)

    def flex_moda(x: peers.Inputs) -> Tensor:
        out, more = compiled()(x.query, peers._eager_align(x), x.value)
        return out * torch.sigmoid(more.lse - x.sink)[..., None].to(out.dtype)

    return flex_moda


def _times(
    candidates: dict[str, Callable[[], object]], device: str, *, gradients: bool, quick: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of interleaved runs of those that run, and why the others do not."""
    able, missing = {}, {}
    with torch.set_grad_enabled(gradients):
        for name, call in candidates.items():
            try:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                able[name] = call
            except Exception as error:  # a peer's own reasons: memory, a missing compiler, an unsupported shape
                if name == "moda_attn":
                    raise
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            gc.collect()
            torch.cuda.empty_cache()
        if device == "cpu":
            return {name: 1e3 * seconds for name, seconds in interleaved(able, 1 if quick else 3).items()}, missing
        return _on_gpu(able), missing


def _on_gpu(calls: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Medians by CUDA events, every call between events of its own, the peers in turn."""
    taken: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        torch.cuda._sleep(AHEAD)
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            taken[name].append((begin, end))
        torch.cuda.synchronize()
    medians = {name: statistics.median(b.elapsed_time(e) for b, e in pairs) for name, pairs in taken.items()}
    return {name: float(f"{median:.4g}") for name, median in medians.items()}


if __name__ == "__main__":
    run(race)
