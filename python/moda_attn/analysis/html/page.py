"""One self-contained page of a balance: no request, no script, readable on a phone, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compare import BalanceComparison
from ..report import BalanceReport
from . import details, sections, words
from .figures import colour_rules, share_letters

if TYPE_CHECKING:
    from ..generation import GenerationBalance
    from ..keyspace import KeySpace


@dataclass(frozen=True)
class SeenImage:
    """A picture and where the attention lay on it.

    Attributes:
        picture: a PIL image or an array (H, W) or (H, W, 3); None shows the maps alone.
        caption: what it is, such as the prompt.
        heat: name of a model -> (L, height, width), as `ReceivedAttention.heat_map` gives it.
        layers: the layers' indices.
        chance: the share of the attention that would lie on the image if it were even, as
            `ReceivedAttention.share_at_chance` gives it; None where it is not known.
    """

    picture: Any
    caption: str
    heat: Mapping[str, np.ndarray]
    layers: Sequence[int]
    chance: float | None = None


@dataclass(frozen=True)
class Answer:
    """A generated answer: its balance, its tokens decoded one by one, and what to call it."""

    balance: GenerationBalance
    words: Sequence[str]
    title: str


@dataclass(frozen=True)
class ReportPage:
    """What a page shows.

    Attributes:
        balance: one report, or two compared.
        title: its heading.
        facts: what was measured: name -> value, both plain text.
        images: pictures with their heat maps.
        answers: where generated tokens looked.
        keys: name of a model -> its key space.
    """

    balance: BalanceReport | BalanceComparison
    title: str = "Attention balance"
    facts: Mapping[str, str] = field(default_factory=dict)
    images: Sequence[SeenImage] = ()
    answers: Sequence[Answer] = ()
    keys: Mapping[str, KeySpace] = field(default_factory=dict)

    def html(self) -> str:
        """The page as one text."""
        style = f"{colour_rules()}\n{files(__package__).joinpath('report.css').read_text(encoding='utf-8')}"
        facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in self.facts.items())
        if isinstance(self.balance, BalanceComparison):
            parts = sections.of_comparison(self.balance)
        else:
            parts = sections.of_report(self.balance)
        body = [
            f"<header><h1>{escape(self.title)}</h1>",
            f'<p class="lead">{words.LEAD}</p>',
            f"<dl>{facts}</dl></header>" if facts else "</header>",
            *parts,
            *details.of_images(self.images),
            *details.of_answers(self.answers),
            *details.of_keys(self.keys),
            sections.traps(),
            sections.numbers(self.balance),
        ]
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{escape(self.title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n'
            "<body>\n<main>\n" + share_letters("\n".join(body)) + "\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Writes the page, making its folder when it is missing."""
        path = Path(path)
        text = self.html()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path
