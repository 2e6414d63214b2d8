"""The demo's look at a real LLaVA checkpoint: its answer and its attention balance before and after the patch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import moda_attn

from ..analysis import BalanceReport, attention_balance

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Look:
    """What a checkpoint said about a picture and where it looked, unpatched and freshly patched."""

    prompt: str
    answers: dict[str, str]
    balances: dict[str, BalanceReport]

    def to_dict(self) -> dict[str, Any]:
        balances = {name: balance.to_dict() for name, balance in self.balances.items()}
        return {"prompt": self.prompt, "answers": self.answers, "balance": balances}

    def __str__(self) -> str:
        blocks = [f"prompt: {self.prompt}"]
        for name, answer in self.answers.items():
            blocks += [f"{name}: {answer!r}", str(self.balances[name])]
        return "\n\n".join(blocks)


def load_checkpoint(name: str, dtype: str = "auto") -> tuple[torch.nn.Module, Any]:
    """The model, in evaluation mode, and its processor, from a folder or a hub id."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).eval(), AutoProcessor.from_pretrained(name)


def open_image(path: Path) -> Image.Image:
    """The picture in RGB; opened before the checkpoint, so that a wrong path does not cost the loading of one."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")


def prepare(model, processor, picture: Image.Image, prompt: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The full prompt and the model's inputs, in its dtype, for one picture and a question.

    A prompt that already holds the image placeholder is taken as it is; otherwise the processor's chat template makes
    it one, or, without a template, LLaVA-1.5's own form does.
    """
    placeholder = processor.image_token
    if placeholder not in prompt:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            prompt = f"USER: {placeholder}\n{prompt} ASSISTANT:"
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    return prompt, dict(inputs.to(model.device, model.dtype))


def look(name: str, image: Path, prompt: str, *, max_new_tokens: int = 64) -> Look:
    """Generates and measures with the unpatched checkpoint, patches it with ``ModaConfig()``, and does so again."""
    picture = open_image(image)
    model, processor = load_checkpoint(name)
    full_prompt, inputs = prepare(model, processor, picture, prompt)
    answers, balances = {}, {}
    for stage in ("unpatched", "patched, untrained"):
        if stage != "unpatched":
            moda_attn.apply(model, moda_attn.ModaConfig())
        answers[stage] = _answer(model, processor, inputs, max_new_tokens)
        balances[stage] = attention_balance(model, **inputs)
    return Look(full_prompt, answers, balances)


def _answer(model, processor, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> str:
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = generated[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
