"""The Trainer of transformers: what it trains, its checkpoints, resuming, and what it does to inputs and labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import moda_attn
import tiny
from moda_attn.errors import ModaValueError

if TYPE_CHECKING:
    from transformers import Trainer

ROWS = ["TTITTT", "TITTTT", "TTTITT", "ITTTTT"]


def data() -> list[dict[str, Tensor]]:
    return tiny.split(tiny.labelled("llava-llama", ROWS))


def model_to_train() -> nn.Module:
    model = tiny.build()
    moda_attn.apply(model)
    tiny.randomise(model)
    return model


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.inputs("llava-llama", ROWS)).logits


def test_checkpoints_hold_the_moda_part_and_can_be_resumed(trainer, tmp_path: Path):
    straight = model_to_train()
    run = trainer(straight, data(), save_strategy="steps", save_steps=2)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    checkpoint = tmp_path / "checkpoint-2"
    halfway = model_to_train()
    trainer(halfway, data(), max_steps=2).train()

    # A checkpoint is a base model and, beside it, what `load_pretrained` reads. The Trainer alone restores the
    # optimizer, but not every model: of some it saves the weights under other names than it looks for.
    resumed = type(straight).from_pretrained(checkpoint)
    moda_attn.load_pretrained(resumed, checkpoint)
    assert torch.equal(logits(resumed), logits(halfway))
    trainer(resumed, data()).train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, straight.state_dict()[name]), name


def test_accumulated_steps_are_those_of_a_larger_batch(trainer):
    whole, pieces = model_to_train(), model_to_train()
    one = trainer(whole, data(), per_device_train_batch_size=4)
    one.train()
    other = trainer(pieces, data(), per_device_train_batch_size=1, gradient_accumulation_steps=4)
    other.train()
    assert losses(other) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"bf16": True}], ids=lambda option: next(iter(option))
)
def test_options_of_the_trainer_change_rounding_only(options: dict, trainer):
    plain, other = trainer(model_to_train(), data()), trainer(model_to_train(), data(), **options)
    plain.train()
    other.train()
    assert losses(other) == pytest.approx(losses(plain), rel=0.03 if "bf16" in options else 1e-5)


def test_evaluation_has_the_prompt_of_training(trainer):
    model = model_to_train()
    run = trainer(model, data())
    loss = run.evaluate()["eval_loss"]
    rows = data()
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        assert loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_without_labels_in_the_call_the_context_must_be_given(trainer):
    """Label smoothing takes the labels out of the call, and columns that forward does not name are dropped."""
    with pytest.raises(ModaValueError, match=r"give labels .* or moda_context"):
        trainer(model_to_train(), data(), label_smoothing_factor=0.1).train()
    rows = [row | {"moda_context": row["labels"] == -100} for row in data()]
    run = trainer(model_to_train(), rows, label_smoothing_factor=0.1, remove_unused_columns=False)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
