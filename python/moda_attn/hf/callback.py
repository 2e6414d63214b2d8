"""The attention balance in the logs of a Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis import BalanceReport, attention_balance
from ..errors import ModaTypeError, ModaValueError


class BalanceCallback(TrainerCallback):
    """Measures the attention balance of the model in training, and logs it with everything else that the Trainer logs.

    ::

        trainer = Trainer(model, ...)
        trainer.add_callback(BalanceCallback(trainer, every=50))

    At the start and after every `every` optimizer steps one forward pass over a fixed batch is made, in evaluation mode
    and without gradients; the modes of the modules, torch's random state and gradients are as before. It goes through
    the Trainer's own ``log``: to TensorBoard, to W&B and to ``state.log_history``, under ``balance/text/disparity``,
    ``.../relative_disparity``, ``.../pseudo_share``, ``.../lift`` and ``.../gamma`` (these two left out where they have
    no value) and the same for every other modality; for the answer rows alone ``balance/text_answers/...``.

    With several processes each makes the pass, which sharded parameters need, and the first one's numbers are reported.
    A batch of as many tokens as a training step costs about a third of it, 0.7 % with ``every=50``: choose fewer.

    Args:
        trainer: whose logs to write to.
        probe: the inputs of ``forward``; with labels the answer rows are logged too. Default: the first batch of the
            Trainer's evaluation set.
        every: optimizer steps from one measurement to the next, 1 or more.

    Raises:
        ModaTypeError: `trainer` is no Trainer, or `probe` no mapping.
        ModaValueError: `every` is below 1, or there is neither a probe nor an evaluation set.
    """

    def __init__(self, trainer: Trainer, probe: Mapping[str, Any] | None = None, *, every: int = 50):
        if not isinstance(trainer, Trainer):
            raise ModaTypeError(f"trainer is a {type(trainer).__name__}; wanted a transformers.Trainer")
        if probe is not None and not isinstance(probe, Mapping):
            raise ModaTypeError(f"probe is a {type(probe).__name__}; wanted a mapping, the inputs of forward by name")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ModaValueError(f"every = {every!r}; wanted a whole number of optimizer steps, 1 or more")
        if probe is None and trainer.eval_dataset is None:
            raise ModaValueError("nothing to measure on: give a probe, or the Trainer an eval_dataset")
        self.trainer = trainer
        self.probe = probe
        self.every = every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure before the first step; not where a training is resumed, which has done so."""
        if state.global_step == 0:
            self._measure(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure after every so many steps."""
        if state.global_step % self.every == 0:
            self._measure(control)

    def _measure(self, control: TrainerControl) -> None:
        trainer = self.trainer
        model: Any = trainer.model
        with _same_random_numbers(model):
            if self.probe is None:
                self.probe = _first_evaluation_batch(trainer)
            inputs = trainer._prepare_inputs(dict(self.probe))
            with trainer.compute_loss_context_manager():
                report = attention_balance(model, **inputs)
        # Logging takes back the wish to log: the loss of this step, due at the same time, would be lost.
        wanted = control.should_log
        trainer.log(logged(report))
        control.should_log = wanted


def logged(report: BalanceReport) -> dict[str, float]:
    """The numbers of a report by the names they have in the logs."""
    logs: dict[str, float] = {}
    for balance in (*report.modalities, *report.answers):
        name = balance.name.removesuffix(" (answer rows)").replace(" ", "_") + "_answers" * balance.answers_only
        numbers = {
            "disparity": balance.disparity,
            "relative_disparity": balance.relative_disparity,
            "pseudo_share": balance.pseudo_share,
            "lift": balance.lift,
            "gamma": balance.decay,
        }
        logs |= {f"balance/{name}/{what}": value for what, value in numbers.items() if math.isfinite(value)}
    return logs


def _first_evaluation_batch(trainer: Trainer) -> Mapping[str, Any]:
    data = trainer.eval_dataset
    loader = trainer.get_eval_dataloader(next(iter(data)) if isinstance(data, dict) else None)
    return next(iter(loader))


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """A block after which torch's random numbers are those that would have come without it."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
