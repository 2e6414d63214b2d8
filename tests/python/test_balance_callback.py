"""The attention balance in the logs of a Trainer: what is logged and when, and that training does not notice."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import moda_attn
import tiny
from moda_attn.errors import ModaTypeError, ModaValueError
from moda_attn.hf import BalanceCallback

ROWS = ["TTITTT", "TITTTT", "TTTITT", "ITTTTT"]
NAMES = ("disparity", "relative_disparity", "pseudo_share", "gamma")


def batch() -> dict[str, Tensor]:
    return tiny.labelled("llava-llama", ROWS)


def model_to_train(patched: bool = True) -> nn.Module:
    model = tiny.build()
    if patched:
        moda_attn.apply(model)
        tiny.randomise(model)
    model.model.multi_modal_projector.act = nn.Dropout(0.2)  # random numbers in every step of training
    return model


class Seen(TrainerCallback):
    """What a reporter such as TensorBoard's gets."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@pytest.fixture
def train(trainer):
    """Makes a Trainer of two steps an epoch, which logs after each."""
    return functools.partial(trainer, rows=tiny.split(batch()), per_device_train_batch_size=2, logging_steps=2)


def measured(seen: Seen) -> dict[int, dict[str, float]]:
    return {step: logs for step, logs in seen.logs if any(name.startswith("balance/") for name in logs)}


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_the_balance_is_logged_and_training_does_not_notice(train, patched: bool):
    plain, watched = model_to_train(patched), model_to_train(patched)
    expected = moda_attn.attention_balance(watched, **batch())
    without = train(plain)
    without.train()
    run, seen = train(watched), Seen()
    run.add_callback(BalanceCallback(run, every=2))
    run.add_callback(seen)
    modes = []
    run.model.register_forward_pre_hook(lambda model, _: modes.append([part.training for part in model.modules()]))
    run.train()
    assert len(modes) == 4 + 3

    logs = measured(seen)
    assert list(logs) == [0, 2, 4]
    for balance in (*expected.modalities, *expected.answers):
        name = ("text", "vision")[balance.modality] + "_answers" * balance.answers_only
        numbers = (balance.disparity, balance.relative_disparity, balance.pseudo_share, balance.decay)
        for what, number in zip(NAMES, numbers, strict=True):
            if number == number:
                assert logs[0][f"balance/{name}/{what}"] == pytest.approx(number, abs=1e-6)
            else:
                assert f"balance/{name}/{what}" not in logs[0]
    after = moda_attn.attention_balance(watched, **batch())
    assert logs[4]["balance/text/disparity"] == pytest.approx(after.of(0).disparity, abs=1e-6)
    assert logs[4] != logs[2] != logs[0]

    # The losses are logged when they were, and are what they were; the same bits in every parameter.
    history = [[(e["step"], e["loss"]) for e in r.state.log_history if "loss" in e] for r in (without, run)]
    assert len(history[0]) == 2
    assert history[0] == history[1]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    training = [mode for mode in modes if any(mode)]
    assert len(training) == 4
    assert all(map(all, training))


def test_a_probe_of_ones_own_and_accumulated_steps(train):
    run, seen = train(model_to_train(), per_device_train_batch_size=1, gradient_accumulation_steps=2), Seen()
    probe = {name: tensor[:1] for name, tensor in batch().items() if name != "labels"}
    run.eval_dataset = None
    run.add_callback(BalanceCallback(run, probe, every=3))
    run.add_callback(seen)
    run.train()
    assert list(measured(seen)) == [0, 3]
    assert not any("answers" in name for name in measured(seen)[0])


def test_a_resumed_training_goes_on_counting(train, tmp_path: Path):
    first = train(model_to_train(), max_steps=2, save_strategy="steps", save_steps=2)
    first.add_callback(BalanceCallback(first, every=2))
    first.train()
    checkpoint = tmp_path / "checkpoint-2"
    model = type(first.model).from_pretrained(checkpoint)
    moda_attn.load_pretrained(model, checkpoint)
    run, seen = train(model), Seen()
    run.add_callback(BalanceCallback(run, every=2))
    run.add_callback(seen)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert list(measured(seen)) == [4]
    steps = [entry["step"] for entry in run.state.log_history if "balance/text/disparity" in entry]
    assert steps == [0, 2, 4]


def test_what_cannot_be_measured_raises_at_once(train):
    run = train(model_to_train())
    with pytest.raises(ModaTypeError, match="trainer is a LlavaForConditionalGeneration"):
        BalanceCallback(run.model)
    with pytest.raises(ModaTypeError, match="probe is a list"):
        BalanceCallback(run, [batch()])
    with pytest.raises(ModaValueError, match="every = 0"):
        BalanceCallback(run, every=0)
    run.eval_dataset = None
    with pytest.raises(ModaValueError, match="give a probe"):
        BalanceCallback(run)
