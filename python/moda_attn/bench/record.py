"""Results as a JSON file: one for each machine, its rows in the order of the lists they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .cases import RACES
from .figures import FIGURES

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


def write(folder: Path, new: Record) -> Path:
    """Puts a record into its file, keeping what :func:`merged` keeps."""
    path = path_for(folder, new["machine"])
    old = json.loads(path.read_text()) if path.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged(old, new), indent=1) + "\n")
    return path
