"""Peak memory of one forward and backward, taken in a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ModaRuntimeError
from .peers import PEERS, make_inputs

MIB = 1 << 20


def peak_memory(peer: str, shape: tuple[int, ...], threads: int) -> float:
    """MiB that float32 forward and backward of a peer need above their inputs; once a process, as its peak never
    falls."""
    torch.set_num_threads(threads)
    inputs = make_inputs(shape, torch.float32, backward=True)
    small = make_inputs((1, 4, 1, 32, shape[-1]), torch.float32, backward=True)
    PEERS[peer](small).backward(small.upstream)  # libraries and threads are up
    before = peak()
    PEERS[peer](inputs).backward(inputs.upstream)
    return (peak() - before) / MIB


def results(shape: tuple[int, ...]) -> float:
    """MiB of what the operators must hold at the end of attention's backward: their results.

    That is the output with its logsumexp, the aligned keys, and the gradients of query, aligned key, value and sink.
    """
    batch, query_heads, key_heads, tokens, dim = shape
    rows = 2 * query_heads * dim + 3 * key_heads * dim + 2 * query_heads
    return 4 * batch * tokens * rows / MIB


def peak() -> int:
    """Most resident bytes of this process so far. Not getrusage's: on Linux that begins at the parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise ModaRuntimeError("peak memory is read from /proc/self/status, which this system lacks")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])
