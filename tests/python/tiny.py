"""Tiny models with random weights, made from their configuration, and inputs for them."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from perturb import randomise
from tiny_configs import IMAGE, PAD, RELEASE, TEXT_END, VIDEO, VIDEO_START, VOCABULARY
from tiny_families import BUILDERS, Builder

__all__ = [
    "BUILDERS",
    "IMAGE",
    "PAD",
    "RELEASE",
    "TEXT_END",
    "VIDEO",
    "VOCABULARY",
    "build",
    "inputs",
    "labelled",
    "modality",
    "randomise",
    "split",
]

#: What most tests run on; those of every family run on ALL.
FAMILIES = ("llava-llama", "llava-mistral", "llava-next-llama", "llava-next-mistral")
ALL = tuple(BUILDERS)


@functools.cache
def _template(family: str) -> nn.Module:
    # Apart from the test's own random numbers, which may not depend on what was built before it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20250710)
        return _made(BUILDERS[family])


def _made(builder: Builder) -> nn.Module:
    model = builder.make()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    with torch.no_grad():
        # Zero padding embeddings, the default, would hide keys of padding that are attended by mistake.
        model.get_input_embeddings().weight[PAD].normal_()
        # Weights of the usual size give flat attention: nothing that goes wrong in it would show in the logits.
        for name, weight in model.get_submodule(builder.decoder).named_parameters():
            if "self_attn" in name:
                weight.mul_(15.0 if "q_proj" in name or "k_proj" in name else 8.0)
            elif weight.dim() == 2:
                weight.mul_(6.0)
        model.lm_head.weight.mul_(5.0)
    return model.eval()


def build(family: str = "llava-llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of the family's tiny model in evaluation mode; always the same weights."""
    return copy.deepcopy(_template(family)).to(dtype)


def inputs(family: str, rows: str | list[str], pad: str = "left", first: int = 0) -> dict[str, Tensor]:
    """Model inputs of rows such as "TTITT", padded to one length: T a text token, I an image, V a video.

    Token ids depend on the number of the row alone, which is `first` for the first; so do the pixels of families whose
    pixels come row by row.
    """
    builder = BUILDERS[family]
    rows = [rows] if isinstance(rows, str) else rows
    spelled = []
    for number, row in enumerate(rows, start=first):
        generator = torch.Generator().manual_seed(11 + number)
        letters = {"I": builder.image, "V": builder.video}
        ids: list[int] = []
        for letter in row:
            text = (int(torch.randint(2, TEXT_END, (1,), generator=generator)),)
            ids += text if letter == "T" else letters[letter]
        spelled.append(ids)
    length = max(map(len, spelled))
    left = pad == "left"
    gaps = [[PAD] * (length - len(ids)) for ids in spelled]
    ids = torch.tensor([(gap + ids) if left else (ids + gap) for gap, ids in zip(gaps, spelled, strict=True)])
    real = [
        [0] * len(gap) + [1] * len(s) if left else [1] * len(s) + [0] * len(gap)
        for gap, s in zip(gaps, spelled, strict=True)
    ]
    result = {"input_ids": ids, "attention_mask": torch.tensor(real)}
    for letter, pixels in (("I", builder.images), ("V", builder.videos)):
        counts = [row.count(letter) for row in rows]
        if any(counts):
            result |= pixels(counts, [torch.Generator().manual_seed(1000 + first + row) for row in range(len(rows))])
    if "mm_token_type_ids" in inspect.signature(_template(family).forward).parameters:
        result["mm_token_type_ids"] = modality(family, result)
    if family in ("paligemma", "gemma3"):
        # The blocks that see both ways: the whole prompt, and every image.
        result["token_type_ids"] = (result["input_ids"] == IMAGE).long() * (family == "gemma3")
    return result


def labelled(family: str, rows: list[str], answer: int = 3, **options: Any) -> dict[str, Tensor]:
    """Inputs of `rows` whose last columns are the answer."""
    x = inputs(family, rows, **options)
    labels = x["input_ids"].clone()
    labels[:, :-answer] = -100
    return x | {"labels": labels}


def split(x: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch with one image each, as a data set has them."""
    return [{name: tensor[row] for name, tensor in x.items()} for row in range(len(x["input_ids"]))]


def modality(family: str, x: dict[str, Tensor]) -> Tensor:
    """What a processor says of each token: 0 text, 1 image, 2 video."""
    ids = x["input_ids"]
    kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    if family == "glm4v" and "pixel_values_videos" in x:
        inside = (ids == VIDEO_START).cumsum(-1) > (ids == VIDEO_START + 1).cumsum(-1)
        kinds = torch.where((ids == IMAGE) & inside, 2, kinds)
    return kinds
