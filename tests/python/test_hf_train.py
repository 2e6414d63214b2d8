"""Training a patched model: gradients of every parameter, checkpointing, a loss that falls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moda_attn
import tiny
from moda_attn import ModaConfig

CONFIGS = {
    "default": ModaConfig(),
    "released": ModaConfig.released(),
    "split": ModaConfig(combine="split", fuser_rank=2, basis="gram"),
    "learned": ModaConfig(mask="learned", fusion="add"),
    "mlp": ModaConfig(aligner="mlp2_gelu", mask="fixed", layers=(1, 2)),
}


def batch(family: str = "llava-llama") -> dict[str, Tensor]:
    x = tiny.inputs(family, ["TTITTTT", "TITTTTITT", "TTTT"])
    labels = x["input_ids"].clone()
    labels[:, :-3] = -100
    return x | {"labels": labels}


def patched(config: ModaConfig, family: str = "llava-llama") -> nn.Module:
    model = tiny.build(family).train()
    moda_attn.apply(model, config)
    tiny.randomise(model)
    return model


def gradients(model: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**x).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if ".moda." in name}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_gets_a_gradient(config: ModaConfig, family: str):
    for name, gradient in gradients(patched(config, family), batch(family)).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_autocast(config: ModaConfig):
    model = patched(config)
    expected = model(**batch()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    loss.backward()
    own = [parameter for name, parameter in model.named_parameters() if ".moda." in name]
    assert all(parameter.grad.isfinite().all() for parameter in own)
    x = {name: tensor for name, tensor in batch().items() if name != "labels"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval().generate(**x, max_new_tokens=3, do_sample=False)


def test_gradients_exist_without_an_image():
    """A batch of text alone gives zeros, not None, to what only images can train."""
    x = batch()
    x = {name: x[name][2:] for name in ("input_ids", "attention_mask", "labels")}
    for name, gradient in gradients(patched(ModaConfig()), x).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


def test_the_gradient_is_the_slope_of_the_loss():
    """A central difference along a random direction of all MODA parameters, in float64."""
    model = tiny.build(dtype=torch.float64)
    moda_attn.apply(model)
    tiny.randomise(model)
    x = batch()
    x["pixel_values"] = x["pixel_values"].double()

    def loss() -> Tensor:
        # The model's own loss is float32, as are its norms, which bounds what a difference can show.
        return nn.functional.cross_entropy(model(**x).logits[:, :-1].flatten(0, 1), x["labels"][:, 1:].flatten())

    loss().backward()
    slopes = {name: parameter.grad for name, parameter in model.named_parameters() if ".moda." in name}
    direction = {name: torch.randn_like(slope) for name, slope in slopes.items()}
    own = {name: parameter for name, parameter in model.named_parameters() if name in slopes}
    step, losses = 1e-4, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.add_(direction[name], alpha=sign * step)
            losses.append(loss().item())
    expected = sum((slopes[name] * direction[name]).sum().item() for name in slopes)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool):
    x = batch()
    model = patched(ModaConfig())
    expected = gradients(model, x)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    loss = model(**x).loss
    # A second forward before the backward: the recomputation must find the first one's modality ids.
    model(**{name: tensor[:1] for name, tensor in x.items()})
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name


def test_training_moda_alone_lowers_the_loss():
    model = patched(ModaConfig())
    model.requires_grad_(False)
    own = [parameter for name, parameter in model.named_parameters() if ".moda." in name]
    for parameter in own:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(own, lr=1e-2)
    x, losses = batch(), []
    for _ in range(30):
        loss = model(**x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
