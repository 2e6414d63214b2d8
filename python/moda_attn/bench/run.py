"""Speed and memory on this machine. Without --dtype and --shape: every row that has a goal, against the goals.

No time is taken before the parity gate is green. Times are medians of interleaved runs in one process; a ratio is a
peer's time over ours, above 1 where moda-attn is faster, ours being the full operator.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ModaError
from . import decoding, peers, record, report
from .cases import RACES, Race, shape
from .figures import FIGURES, Figure
from .gate import TOLERANCES, gate
from .machine import Company, describe
from .process import in_a_fresh_process
from .timing import interleaved

SHAPES = ((1, 32, 8, 1024, 128), (1, 32, 8, 2048, 128), (2, 16, 16, 1024, 64))
SECTIONS = tuple(dict.fromkeys([*(race.section for race in RACES), *(figure.section for figure in FIGURES)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the options ask for and prints it; ``--record FOLDER`` also writes it as JSON."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.resume and not options.record:
        parser.error("--resume needs --record FOLDER, the record that is resumed")
    if options.tables:
        recorded = json.loads(options.tables.read_text(encoding="utf-8"))
        print(report.headline(recorded), report.table(recorded), sep="\n\n")
        return 0
    torch.set_num_threads(options.threads)
    machine = describe(options.threads)
    samples = options.repeat or (3 if options.quick else 5)
    print(f"{machine['cpu']} ({machine['family']}), {options.threads} threads, kernels: {machine['isa']}")
    print(f"torch {machine['torch']} ({machine['torch_capability']}); ours, then each peer's time over ours")
    races, figures = _selection(options, machine)
    rows: dict[str, list[dict[str, Any]]] = {"races": [], "figures": []}
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()

    def take(part: str, row: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> None:
        rows[part].append(row)
        print(line(row), flush=True)
        if options.record:  # at once, so that an interruption loses nothing
            record.write(options.record, {"machine": machine, "date": date, "samples": samples, **rows})

    try:
        for race in _announced(races):
            take("races", _alone(run_race, race, options.threads, samples), report.race_line)
        for figure in _announced(figures):
            take("figures", _alone(run_figure, figure, options.threads, samples), report.figure_line)
    except ModaError as error:
        print(f"moda-attn bench: {error}", file=sys.stderr)
        return 1
    _summary([*rows["races"], *rows["figures"]])
    if options.record:
        print(f"written: {record.path_for(options.record, machine)}")
    return 0


def _alone(measure: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """A row, and in it what other processes took of the machine meanwhile."""
    company = Company()
    row = measure(*arguments)
    others = company.share()
    return {**row, "others": others and round(others, 3)}


def run_race(race: Race, threads: int, samples: int) -> dict[str, Any]:
    """One race as a row: gate, then times; where it names an instruction set, in a process that has no other."""
    if race.isa is None:
        return _run_race_here(race, threads, samples)
    only = {"MODA_ATTN_ISA": race.isa, "ATEN_CPU_CAPABILITY": race.isa}
    return in_a_fresh_process(only, _run_race_here, race, threads, samples)


def _run_race_here(race: Race, threads: int, samples: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    errors = gate(race)
    times = interleaved(_runs(race), samples)
    return {
        "name": race.name,
        "section": race.section,
        "dtype": race.dtype,
        "kind": race.kind,
        "shape": list(race.shape),
        "isa": race.isa,
        "times_ms": {name: _rounded(1e3 * seconds) for name, seconds in times.items()},
        "goals": dict(race.goals),
        "parity": {name: _rounded(error) for name, error in errors.items()},
    }


def _runs(race: Race) -> dict[str, Callable[[], object]]:
    dtype = getattr(torch, race.dtype)
    names = (*race.peers, "moda_attn")
    if race.decode:
        step = decoding.make_step(race.shape, dtype)
        return {name: _forward(decoding.PEERS[name], step) for name in names}
    inputs = peers.make_inputs(race.shape, dtype, backward=race.backward)
    make = _forward_and_backward if race.backward else _forward
    return {name: make(peers.PEERS[name], inputs) for name in names}


def _forward(peer: Callable[[Any], torch.Tensor], inputs: object) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return peer(inputs)

    return run


def _forward_and_backward(peer: peers.Peer, inputs: peers.Inputs) -> Callable[[], None]:
    def run() -> None:
        peer(inputs).backward(inputs.upstream)
        for leaf in inputs.leaves:
            leaf.grad = None

    return run


def run_figure(figure: Figure, threads: int, samples: int) -> dict[str, Any]:
    """One figure as a row."""
    value = figure.measure(threads, samples)
    return {
        "name": figure.name,
        "section": figure.section,
        "value": None if value is None else _rounded(value),
        "unit": figure.unit,
        "goal": figure.goal,
        "met": figure.met(value),
    }


def _selection(options: argparse.Namespace, machine: dict[str, Any]) -> tuple[list[Race], list[Figure]]:
    if options.dtype or options.shape:
        dtypes, sizes = options.dtype or ["float32", "bfloat16"], options.shape or SHAPES
        both = (False, True)
        return [Race("own", d, s, backward=backward) for d in dtypes for s in sizes for backward in both], []
    wanted = options.only or SECTIONS
    done = record.settled(options.record, machine) if options.resume else set()
    chosen: list[list[Any]] = [
        [
            item
            for item in items
            if item.section in wanted and item.name not in done and (item.quick or not options.quick)
        ]
        for items in (RACES, FIGURES)
    ]
    return chosen[0], chosen[1]


def _announced(items: Iterable[Any]) -> Iterable[Any]:
    section = None
    for item in items:
        if item.section != section:
            section = item.section
            print(f"\n{section}", flush=True)
        yield item


def _summary(rows: list[dict[str, Any]]) -> None:
    misses = [miss for row in rows for miss in report.misses(row)]
    goals = sum(len(row["goals"]) if "goals" in row else row["met"] is not None for row in rows)
    print(f"\nevery race stood behind a green parity check; {goals - len(misses)} of {goals} goals met")
    for miss in misses:
        print(f"  missed: {miss}")
    if noisy := sum((row["others"] or 0) > report.NOISY for row in rows):
        print(f"other processes were at work during {noisy} of {len(rows)} rows: do not quote those")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moda-attn bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="a few rows, fewer samples")
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCES, help="races of your own, without goals: their dtypes")
    parser.add_argument("--shape", nargs="+", type=shape, metavar="B,HQ,HKV,N,D", help="and their shapes")
    parser.add_argument("--repeat", type=int, help="samples of each peer, at least (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER", help="write the results to this machine's file in a folder"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out what --record holds of this machine and these versions, if others let it alone then",
    )
    parser.add_argument("--tables", type=Path, metavar="FILE", help="print the tables of a record, and measure nothing")
    return parser
