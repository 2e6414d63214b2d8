"""What `moda-attn balance` does: load, measure on every example, print, write."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .. import __version__
from ..config import TEXT
from ..demo.checkpoint import load_checkpoint, open_image, prepare
from ..errors import ModaValueError
from ..hf import load_pretrained
from .compare import BalanceComparison, compare
from .dataset import balance_over
from .examples import Example, from_images, from_jsonl
from .generation import generation_balance
from .html import Answer, ReportPage, SeenImage
from .keys import KeyTally
from .keyspace import KeySpace
from .measure import IGNORE_INDEX
from .received import ReceivedAttention, received_attention
from .report import BalanceReport

T = TypeVar("T")


@dataclass
class Measured:
    """What was measured of one model; all but the balance for a page, maps and answers on the first examples."""

    balance: BalanceReport
    received: list[ReceivedAttention] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    keys: dict[str, KeySpace] = field(default_factory=dict)


def run(options: Namespace) -> int:
    """The command; see `moda-attn balance --help`."""
    examples = from_jsonl(options.data) if options.data else from_images(options.images, options.prompt)
    examples = examples[: options.limit]
    wants_page = any(path.suffix == ".html" for path in options.out)
    shown = options.shown if wants_page else 0
    measured = {
        name: measure(model, processor, examples, _Detail(name, shown, options.max_new_tokens))
        for name, model, processor in models(options)
    }
    names = list(measured)
    balance: BalanceReport | BalanceComparison = measured[names[0]].balance
    if len(names) == 2:
        balance = compare(measured[names[0]].balance, measured[names[1]].balance, names=(names[0], names[1]))
    print(balance)
    for path in options.out:
        if path.suffix == ".json":
            balance.to_json(path)
        else:
            page(balance, measured, examples, options).write(path)
        print(f"\nwritten: {path}")
    return 0


def models(options: Namespace) -> Iterator[tuple[str, nn.Module, Any]]:
    """The models to measure with their names, the one to compare with first; a checkpoint is loaded once."""
    other, title = options.compare_with, _title(options)
    loaded = None
    if other is not None:
        loaded = load_checkpoint(other)
        yield "without MODA" if other == options.model else Path(other).name, *loaded
        if other != options.model:
            loaded = None
    model, processor = loaded or load_checkpoint(options.model)
    if options.moda is not None:
        load_pretrained(model, options.moda)
    yield title, model, processor


def _title(options: Namespace) -> str:
    if options.compare_with == options.model:
        return "with MODA"
    name = Path(options.model).name
    if options.moda is not None:
        name += " with MODA"
    # Two checkpoints of one name in different folders.
    same = options.compare_with is not None and Path(options.compare_with).name == name
    return options.model if same else name


@dataclass(frozen=True)
class _Detail:
    """The model's name, and of how many examples a page shows maps and answers of how many tokens."""

    name: str
    shown: int
    max_new_tokens: int


def measure(model: nn.Module, processor: Any, examples: Sequence[Example], detail: _Detail) -> Measured:
    """The balance over all examples, for a page their key space, and the details of the first."""
    inputs = (model_inputs(model, processor, example) for example in examples)
    keys = KeyTally() if detail.shown else None
    result = Measured(balance_over(model, _progress(inputs, len(examples), detail.name), keys=keys))
    if keys is not None:
        result.keys[detail.name] = keys.space()
    for example in examples[: detail.shown]:
        result.received.append(received_attention(model, **model_inputs(model, processor, example)))
        if detail.max_new_tokens > 0:
            result.answers.append(_answer(model, processor, example, detail))
    return result


def model_inputs(model: nn.Module, processor: Any, example: Example) -> dict[str, Any]:
    """The model's inputs; with an answer its tokens follow the prompt and are the labels."""
    _, inputs = prepare(model, processor, open_image(example.image), example.prompt)
    if example.answer is None:
        return inputs
    answer = processor.tokenizer(example.answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = answer.to(inputs["input_ids"].device)
    shape = inputs["input_ids"].shape
    labels = torch.full(shape, IGNORE_INDEX, device=answer.device)
    # What stands beside each token, such as its modality, is 0 for text.
    after = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    longer = {
        name: torch.cat([value, after.get(name, torch.zeros_like(answer)).to(value.dtype)], dim=1)
        for name, value in inputs.items()
        if value.shape == shape
    }
    return {**inputs, **longer, "labels": torch.cat([labels, answer], dim=1)}


def _answer(model: nn.Module, processor: Any, example: Example, detail: _Detail) -> Answer:
    _, inputs = prepare(model, processor, open_image(example.image), example.prompt)
    balance = generation_balance(model, max_new_tokens=detail.max_new_tokens, do_sample=False, **inputs)
    words = [processor.tokenizer.decode([token]) for token in balance.tokens[0].tolist() if token >= 0]
    return Answer(balance, words, f"{detail.name}: {example.image.name}")


def page(
    balance: BalanceReport | BalanceComparison,
    measured: dict[str, Measured],
    examples: Sequence[Example],
    options: Namespace,
) -> ReportPage:
    """The page of one model, or of two compared."""
    facts = {"model": options.model}
    if options.moda is not None:
        facts["MODA weights"] = str(options.moda)
    if options.compare_with not in (None, options.model):
        facts["compared with"] = options.compare_with
    facts["inputs"] = f"{len(examples)} of {options.data or options.images}"
    if options.prompt is not None:
        facts["prompt"] = options.prompt
    facts["measured by"] = f"moda-attn {__version__}"
    images = [seen for place in range(options.shown) for seen in _seen(place, measured, examples)]
    answers = [
        answer for place in range(options.shown) for m in measured.values() for answer in m.answers[place : place + 1]
    ]
    keys = {name: space for found in measured.values() for name, space in found.keys.items()}
    title = "Attention balance: " + " and ".join(measured)
    return ReportPage(balance, title, facts, images, answers, keys)


def _seen(place: int, measured: dict[str, Measured], examples: Sequence[Example]) -> Iterator[SeenImage]:
    """The maps of the first image of an example; where nothing says how its tokens lie, a word about that instead."""
    received = {name: found.received[place] for name, found in measured.items() if place < len(found.received)}
    if not received:
        return
    example = examples[place]
    try:
        heat = {name: found.heat_map(modality=TEXT) for name, found in received.items()}
    except (ModaValueError, IndexError) as error:
        print(f"moda-attn balance: no heat map of {example.image}: {error}", file=sys.stderr)
        return
    first = next(iter(received.values()))
    caption, chance = f"{example.image.name}: “{example.prompt}”", first.share_at_chance()
    yield SeenImage(open_image(example.image), caption, heat, first.layers, chance)


def _progress(items: Iterable[T], total: int, title: str) -> Iterable[T]:
    """A bar, where tqdm is installed and there is more than one item."""
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return items
    return tqdm(items, total=total, desc=title, disable=total < 2)
