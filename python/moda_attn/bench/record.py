"""Results as a JSON file: one for each machine, its rows in the order of the lists they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .cases import RACES
from .figures import FIGURES
from .report import NOISY

Record = dict[str, Any]


def path_for(folder: Path, machine: dict[str, Any]) -> Path:
    """The file of a machine in a folder of records."""
    name = f"{machine['cpu']}-{machine['family']}-{machine['threads']}-threads".lower()
    return folder / f"{re.sub('[^a-z0-9]+', '-', name).strip('-')}.json"


def merged(old: Record | None, new: Record) -> Record:
    """The new rows, and the old ones of what was not measured anew, if machine and versions are the same."""
    if old is None or old["machine"] != new["machine"]:
        return new
    rows = {}
    order = {"races": [race.name for race in RACES], "figures": [figure.name for figure in FIGURES]}
    for part, names in order.items():
        place = {name: index for index, name in enumerate(names)}
        known = {row["name"]: row for row in (*old[part], *new[part])}
        rows[part] = sorted(known.values(), key=lambda row: place.get(row["name"], len(place)))
    return {**new, **rows}


def read(folder: Path, machine: dict[str, Any]) -> Record | None:
    """The record of a machine, if there is one."""
    path = path_for(folder, machine)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(folder: Path, new: Record) -> Path:
    """Puts a record into its file, keeping what :func:`merged` keeps."""
    path = path_for(folder, new["machine"])
    rows = merged(read(folder, new["machine"]), new)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path


def settled(folder: Path, machine: dict[str, Any]) -> set[str]:
    """Names of the rows that were recorded with these versions while the machine had nothing else to do."""
    old = read(folder, machine)
    if old is None or old["machine"] != machine:
        return set()
    return {row["name"] for row in (*old["races"], *old["figures"]) if (row["others"] or 0) <= NOISY}
