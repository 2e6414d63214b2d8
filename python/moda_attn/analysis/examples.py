"""What `moda-attn balance` measures on: pictures with a prompt, or a JSON Lines file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModaValueError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FIELDS = {"image": True, "prompt": True, "answer": False}


@dataclass(frozen=True)
class Example:
    """A picture, what is asked about it, and, where it is known, the answer, whose tokens are the supervised ones."""

    image: Path
    prompt: str
    answer: str | None = None


def from_images(path: Path, prompt: str) -> list[Example]:
    """The picture, or every picture of a folder in the order of their names, with one prompt.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ModaValueError: a folder without pictures.
    """
    if path.is_file():
        return [Example(path, prompt)]
    if not path.exists():
        raise FileNotFoundError(f"--images {path}: no such file or folder")
    found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
    if not found:
        raise ModaValueError(f"--images {path}: no picture in this folder; {', '.join(SUFFIXES)} wanted")
    return [Example(entry, prompt) for entry in found]


def from_jsonl(path: Path) -> list[Example]:
    """One example a line: ``{"image": "cat.png", "prompt": "What is this?", "answer": "A cat."}``.

    ``image`` is a path, relative to the file's folder; ``answer`` may be missing. Empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file, or not the picture that a line names.
        ModaValueError: a line that says something else, with its number; or no line at all.
    """
    examples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                examples.append(_example(line, path.parent, f"{path}, line {number}"))
    if not examples:
        raise ModaValueError(f"{path}: no examples; one JSON object a line wanted")
    return examples


def _example(line: str, folder: Path, where: str) -> Example:
    try:
        fields: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ModaValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(fields, dict):
        raise ModaValueError(f"{where}: {type(fields).__name__} given; an object with {_wanted()} wanted")
    for name, value in fields.items():
        if name not in _FIELDS:
            raise ModaValueError(f"{where}: unknown field {name!r}; {_wanted()} wanted")
        if not isinstance(value, str) and not (value is None and not _FIELDS[name]):
            raise ModaValueError(f"{where}: {name!r} is {type(value).__name__}; a string wanted")
    missing = [name for name, needed in _FIELDS.items() if needed and name not in fields]
    if missing:
        raise ModaValueError(f"{where}: no {' and no '.join(map(repr, missing))}; {_wanted()} wanted")
    image = folder / fields["image"]
    if not image.is_file():
        raise FileNotFoundError(f"{where}: no such picture: {image}")
    return Example(image, fields["prompt"], fields.get("answer"))


def _wanted() -> str:
    return ", ".join(f"{name!r}" + ("" if needed else " (optional)") for name, needed in _FIELDS.items())
