"""All golden cases: outputs and gradients of the released attention layer, reproduced with its configuration."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tolerance import relative_l2

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "layer_cases.json").read_text())["cases"]
BOUND = {"float64": 1e-12, "float32": 2e-6}
BACKENDS = ("reference", "functional")


def load(name: str) -> dict[str, torch.Tensor]:
    stem = name.rsplit(".", 1)[0]
    with safe_open(GOLDEN / CASES[name]["file"], framework="pt") as file:
        keys = file.keys()
        return {key.split("/")[1]: file.get_tensor(key) for key in keys if key.split("/")[0] == stem}


def released(ops, golden: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and leaf inputs of the released layer, computed with our operators.

    Only vision keys are aligned: ``k W^T + (unit k T) diag(r) W^T`` with the covariance basis of the text tokens.
    """
    leaves = {name: golden[name].clone().requires_grad_() for name in ("q", "k", "v", "ratio_v", "pfuser_v")}
    modality = torch.where(golden["vflag"], 1, torch.where(golden["tflag"], 0, -1))
    fuser = leaves["pfuser_v"].T
    eye, nothing = torch.eye(fuser.shape[0], dtype=fuser.dtype), torch.zeros_like(fuser)
    keep = torch.stack([eye, fuser])
    mix = torch.stack([nothing, leaves["ratio_v"][:, None] * fuser])
    aligned, _ = ops.duplex_align(leaves["k"], leaves["v"], modality, keep, mix, kind="covariance")
    out = ops.modular_attention(leaves["q"], aligned, leaves["v"], modality)
    group = leaves["q"].shape[1] // leaves["k"].shape[1]
    return {"k_aligned": aligned.repeat_interleave(group, dim=1), "out": out}, leaves


def test_every_case_is_there():
    assert len(CASES) == 52
    assert {case["dtype"] for case in CASES.values()} == set(BOUND)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, backend: str):
    ops = importlib.import_module(f"moda_attn.{backend}")
    golden = load(name)
    outputs, leaves = released(ops, golden)
    (outputs["out"] * golden["grad_out"]).sum().backward()

    # The release averages all values on padded query rows; that is an accident of its mask, not a result.
    real = golden["attention_mask"][:, None, :, None]
    errors = {
        "k_aligned": relative_l2(outputs["k_aligned"] * real, golden["k_aligned"] * real),
        "out": relative_l2(outputs["out"] * real, golden["out"] * real),
    }
    errors |= {f"d{leaf}": relative_l2(tensor.grad, golden[f"d{leaf}"]) for leaf, tensor in leaves.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= BOUND[CASES[name]["dtype"]], f"{name}, {backend}: {worst} is off by {errors[worst]:.3g}"
