"""What is raced, and the goals: one list.

A goal is the least that a peer's time divided by ours may be, ours being the full operator (alignment, sink and bias).
Goals are stated for two threads. Those of bfloat16 prefill were set with AMX in mind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SDPA, STOCK, DENSE = "sdpa", "sdpa_moda", "eager_moda"

#: (dtype, backward) -> goals where four query heads share a key head.
GROUPED: dict[tuple[str, bool], dict[str, float]] = {
    ("float32", False): {SDPA: 1.35, STOCK: 1.6, DENSE: 10},
    ("float32", True): {SDPA: 1.25, STOCK: 1.5, DENSE: 7},
    ("bfloat16", False): {SDPA: 2.7, STOCK: 4.0, DENSE: 70},
    ("bfloat16", True): {SDPA: 2.2, STOCK: 2.9, DENSE: 22},
    ("float16", False): {SDPA: 1.35, STOCK: 1.6, DENSE: 10},
}
#: dtype -> goal where every query head has a key head of its own: alignment is a fifth to a third of the work there.
UNGROUPED = {"float32": {STOCK: 1.8}, "bfloat16": {STOCK: 3.0}}

#: Dense scores of longer sequences take more time and memory than they are worth.
LONGEST_DENSE = 1024


@dataclass(frozen=True)
class Race:
    """One row: the same inputs for every peer. Shape is B, Hq, Hkv, N, D."""

    section: str
    dtype: str
    shape: tuple[int, int, int, int, int]
    goals: Mapping[str, float] = field(default_factory=dict)
    backward: bool = False
    #: One new token over a cache of N keys instead of N queries over N keys.
    decode: bool = False
    #: An instruction set that both sides are held to, in a process of its own; None is the widest of the machine.
    isa: str | None = None
    #: Whether ``--quick`` takes it too.
    quick: bool = False

    @property
    def name(self) -> str:
        """Unique among the races."""
        isa = f" with {self.isa}" if self.isa else ""
        return f"{self.dtype} {self.kind} {self.sizes}{isa}"

    @property
    def sizes(self) -> str:
        """The shape, as ``--shape`` takes it."""
        return ",".join(map(str, self.shape))

    @property
    def kind(self) -> str:
        """What is computed."""
        if self.decode:
            return "decode"
        return "forward + backward" if self.backward else "forward"

    @property
    def peers(self) -> tuple[str, ...]:
        """Who runs beside us."""
        dense = self.shape[3] <= LONGEST_DENSE and not self.decode
        return (SDPA, STOCK, DENSE) if dense else (SDPA, STOCK)


def shape(text: str) -> tuple[int, int, int, int, int]:
    """A shape from its text, B,Hq,Hkv,N,D."""
    batch, query_heads, key_heads, tokens, dim = (int(size) for size in text.split(","))
    return batch, query_heads, key_heads, tokens, dim


def _prefill() -> list[Race]:
    races = []
    for (dtype, backward), goals in GROUPED.items():
        section = f"{dtype}-{'training' if backward else 'forward'}"
        for tokens in (512, 1024, 2048):
            for dim in (64, 128):
                here = {peer: goal for peer, goal in goals.items() if peer != DENSE or tokens <= LONGEST_DENSE}
                quick = tokens == 1024 and dim == 128
                races.append(Race(section, dtype, (1, 32, 8, tokens, dim), here, backward, quick=quick))
        if dtype in UNGROUPED:
            for shape in ((2, 16, 16, 1024, 64), (1, 16, 16, 1024, 128)):
                races.append(Race(section, dtype, shape, UNGROUPED[dtype], backward))
    return races


def _decode() -> list[Race]:
    return [
        Race("decode", dtype, (batch, 32, 8, 4096, 128), {SDPA: 2.0}, decode=True, quick=batch == 1)
        for dtype in ("bfloat16", "float32")
        for batch in (1, 8)
    ]


def _long() -> list[Race]:
    # Packed keys and values of a head outgrow the second level cache; what is measured does not depend on the heads.
    shapes = ((1, 16, 4, 4096, 128), (1, 8, 2, 8192, 128))
    return [Race("long", "bfloat16", shape, {SDPA: 2.4}) for shape in shapes]


def _short() -> list[Race]:
    return [
        Race("short", dtype, (1, 4, 2, tokens, 32), {STOCK: 1.0}, backward, quick=tokens == 64)
        for dtype, backward in (("float32", False), ("float32", True), ("bfloat16", False))
        for tokens in (16, 32, 64, 128)
    ]


def _without_avx512() -> list[Race]:
    return [
        Race("avx2", "float32", (1, 32, 8, 1024, dim), {SDPA: 1.1}, backward, isa="avx2")
        for backward in (False, True)
        for dim in (64, 128)
    ]


RACES: tuple[Race, ...] = (*_prefill(), *_long(), *_decode(), *_short(), *_without_avx512())
