"""The training recipe, the same for the unpatched and the patched model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .data import KINDS, Digits, training_batch, training_stream
from .tokenizer import WordTokenizer


@dataclass(frozen=True)
class Recipe:
    """How long, how fast and on what to train; ``seed`` fixes the model's start, the questions and the pixel noise."""

    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    decay: float = 0.35
    pixel_noise: float = 0.5
    kinds: tuple[str, ...] = KINDS
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step: a short warm-up, constant, then linear decay over the last part ``decay``."""
        risen, left = (step + 1) / self.steps, 1.0 - step / self.steps
        return self.learning_rate * min(1.0, risen / self.warmup, left / self.decay)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of the base model only.

    MODA's parameters carry meaning at their start (keep = I, ALiBi slopes, base): decaying them to zero would undo it.
    """
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or ".moda." in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def train(model, digits: Digits, tokenizer: WordTokenizer, recipe: Recipe, title: str) -> list[float]:
    """Trains ``model`` in place behind a progress bar and returns the loss of every step.

    The same recipe and the same start give the same weights.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.98)
    )
    noise = torch.Generator().manual_seed(recipe.seed)
    stream = training_stream(digits, recipe.batch_size, recipe.steps, recipe.seed, recipe.kinds)
    losses: list[float] = []
    model.train()
    bar = tqdm(stream, total=recipe.steps, desc=title, unit="step", dynamic_ncols=True, mininterval=0.5)
    for step, questions in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        batch = training_batch(questions, digits, tokenizer)
        # 1100 scans are few: without the noise the small tower learns them by heart.
        batch["pixel_values"] += recipe.pixel_noise * torch.randn(batch["pixel_values"].shape, generator=noise)
        loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses
