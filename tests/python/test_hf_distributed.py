"""Two ranks over gloo: the same losses as one process, and no parameter that a rank leaves behind.

Both ranks run once, in processes of their own (`two_ranks.py`); the tests read what they reported.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moda_attn
import two_ranks

SECONDS = 600  # they take 10 on two free cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two-ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("two_ranks.py"))]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if "lo" in (name for _, name in socket.if_nameindex()):
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # gloo's own choice is what the host's name resolves to, if it does
    ranks, logs = [], [folder / f"rank-{rank}.log" for rank in range(two_ranks.WORLD)]
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            arguments = [*program, str(rank), str(folder / "store"), str(folder)]
            ranks.append(subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + SECONDS
    try:
        codes = [rank.wait(timeout=max(deadline - time.monotonic(), 1)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    return json.loads((folder / "results.json").read_text())


@functools.cache
def alone(batch: str, name: str, dtype: torch.dtype = torch.float32, **options: float) -> list[float]:
    """The losses of one process that has both ranks' rows."""
    x = dict(two_ranks.BATCHES[batch][0])
    x["pixel_values"] = x["pixel_values"].to(dtype)
    return two_ranks.train(two_ranks.build(two_ranks.CONFIGS[name], dtype), x, ranks=1, **options)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("batch", "name"), two_ranks.GRID)
def test_two_ranks_train_as_one_process(kind: str, batch: str, name: str, results: dict[str, Any]):
    expected = alone(batch, name)
    assert expected[0] - expected[-1] > 0.3  # otherwise this would show nothing
    assert results[f"{kind}/{batch}/{name}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "case", ["ddp/reentrant checkpoints", "ddp/checkpoints", "fsdp/reentrant checkpoints", "fsdp/checkpoints"]
)
def test_checkpointing_changes_nothing(case: str, results: dict[str, Any]):
    kind = case.split("/")[0]
    assert results[case] == results[f"{kind}/images/default"]


def test_fsdp_units_of_their_own_change_nothing(results: dict[str, Any]):
    assert results["fsdp/own parts"] == results["fsdp/images/default"]


def test_fsdp_of_a_bfloat16_model_with_float32_parameters(results: dict[str, Any]):
    """FSDP wants one dtype in a unit, so MODA's parts are units of their own."""
    assert results["fsdp/bfloat16"] == pytest.approx(
        alone("images", "default", torch.bfloat16, lr=two_ranks.LOW_RATE), rel=1e-2
    )


def test_fsdp_with_mixed_precision(results: dict[str, Any]):
    """It hands every layer a copy of its arguments, with the tensors cast."""
    assert results["fsdp/mixed precision"] == pytest.approx(alone("images", "default", lr=two_ranks.LOW_RATE), rel=2e-2)


def test_sharded_parameters_are_saved_whole_and_loaded(results: dict[str, Any], folder: Path):
    own, loaded = results["fsdp/saved"]
    assert loaded == own
    weights = load_file(folder / "sharded" / "moda_model.safetensors")
    assert weights["layers.0.aligner.fuser.keep"].shape == (2, 8, 8)
    model = two_ranks.only_moda(two_ranks.build())
    two_ranks.train(model, two_ranks.BATCHES["images"][0], ranks=1)
    expected = model.model.language_model.layers[2].self_attn.moda.aligner.fuser.mix
    torch.testing.assert_close(weights["layers.2.aligner.fuser.mix"], expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_balance_is_logged_at_every_step_of_a_distributed_training(results: dict[str, Any]):
    logs = results["trainer"]
    assert isinstance(logs, list), logs
    assert [entry["step"] for entry in logs] == list(range(two_ranks.STEPS + 1))
    start = moda_attn.attention_balance(two_ranks.build(), **two_ranks.rows("TTITTT", "TITTTT"))
    assert logs[0]["balance/text/disparity"] == pytest.approx(start.of(0).disparity, abs=1e-6)
    assert logs[-1]["balance/text/disparity"] != logs[0]["balance/text/disparity"]


def test_the_balance_of_a_sharded_model(results: dict[str, Any]):
    x = two_ranks.share(two_ranks.BATCHES["images"][0], 0, (1, 1))
    whole = moda_attn.attention_balance(two_ranks.build(), **x)
    assert results["fsdp/balance"] == pytest.approx(whole.of(0).disparity, abs=1e-6)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ddp/applied late", "ModaRuntimeError: DistributedDataParallel does not know MODA's parameters"),
        ("fsdp/applied late", "ModaValueError: the model's weights are sharded"),
        ("fsdp/removed", "ModaValueError: FSDP holds MODA's parameters"),
    ],
)
def test_the_wrong_order_raises(case: str, message: str, results: dict[str, Any]):
    assert results[case].startswith(message)
