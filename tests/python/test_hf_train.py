"""Training a patched model: gradients of every parameter, checkpointing, a loss that falls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.errors import ModaRuntimeError

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


ALIGN = {
    "off": {"align": ()},
    "duplex": {},
    "text": {"align": ("text",), "fuser_rank": 2},
    "vision": {"align": ("vision",), "fusion": "gated", "basis": "gram"},
    "add": {"fusion": "add"},
    "mlp": {"aligner": "mlp"},
    "three": {"num_modalities": 3, "align": (0, 1, 2)},
}


def lean_batches() -> dict[str, dict[str, Tensor]]:
    """Batches that lack a modality, in the row, in the context or altogether."""
    full = batch()
    text = {name: full[name][2:] for name in ("input_ids", "attention_mask", "labels")}
    image = tiny.inputs("llava-llama", ["II", "I"])
    late = tiny.inputs("llava-llama", ["TTTITT", "TTTTTT"], pad="right")
    late |= {"labels": late["input_ids"].clone()}  # an answer before the image, and no question
    unanswered = full | {"labels": full["labels"].clone()}
    unanswered["labels"][1] = -100
    return {
        "text alone": text,
        "images alone": image | {"labels": image["input_ids"]},
        "an image in the answer": late,
        "a row without an answer": unanswered,
    }


@pytest.mark.parametrize("prior", [False, True], ids=["", "prior"])
@pytest.mark.parametrize("mask", ["none", "fixed", "decay", "learned"])
def test_no_parameter_without_a_gradient(mask: str, prior: bool):
    """Zeros, where a batch has nothing to teach a parameter; never None, which DDP takes for a mistake."""
    model, batches = tiny.build().train(), lean_batches()
    model.requires_grad_(False)
    for name, changes in ALIGN.items():
        for combine in ("joint", "split"):
            config = ModaConfig(mask=mask, location_prior=prior, combine=combine, **changes)
            if not moda_attn.apply(model, config).parameters:
                assert name in ("off", "add")
                assert mask == "none"
                moda_attn.remove(model)
                continue
            tiny.randomise(model)
            for kind, x in batches.items():
                for parameter, gradient in gradients(model, x).items():
                    assert gradient is not None, (config, kind, parameter)
                    assert gradient.isfinite().all(), (config, kind, parameter)
            moda_attn.remove(model)


def test_pseudo_scores_that_no_row_has_still_have_a_gradient():
    """Past the span a row has none: its sink is minus infinity, and the gradient zero."""
    for mask in ("fixed", "decay", "learned"):
        for name, gradient in gradients(patched(ModaConfig(mask=mask, span=1)), batch()).items():
            assert gradient.isfinite().all(), name
            assert not (".mask." in name and gradient.any()), name


def test_labels_mark_the_prompt():
    """The context of a training step is what comes before a row's first label; the label of column 0 does not count."""
    model = patched(ModaConfig())
    x = batch()
    labels = x["labels"]
    labels[0, -1] = -100  # a row that ends unsupervised
    labels[1, :] = -100  # all of a row without an answer is its prompt
    labels[2, 0] = 5
    length = labels.shape[1]
    ends = torch.tensor([length - 3, length, length - 3])
    context = torch.arange(length) < ends[:, None]
    by_labels = model(**x).loss
    assert torch.equal(model(**x, moda_context=context).loss, by_labels)
    for other in (context.roll(1, -1), torch.ones_like(context)):
        assert not torch.equal(model(**x, moda_context=other).loss, by_labels)


def test_an_answer_reaches_no_earlier_loss_through_a_basis():
    x = batch()
    labels = x["labels"]
    losses = {}
    for context in ("prompt", "all"):
        model = patched(ModaConfig(context=context))
        both = []
        for answer in (5, 9):
            y = x | {"input_ids": x["input_ids"].clone()}
            y["input_ids"][:, -1] = answer  # read by nothing that these labels ask for
            both.append(
                model(**y | {"labels": torch.where(torch.arange(labels.shape[1]) < labels.shape[1] - 1, labels, -100)})
            )
        losses[context] = [output.loss.item() for output in both]
    assert losses["prompt"][0] == losses["prompt"][1]
    assert losses["all"][0] != losses["all"][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.float32, None], ids=["float32 parameters", "all of one dtype"])
def test_models_of_lower_precision_train(dtype: torch.dtype, own: torch.dtype | None):
    model = patched(ModaConfig())
    expected = gradients(model, batch())
    low = tiny.build(dtype=dtype).train()
    moda_attn.apply(low)
    tiny.randomise(low)
    if own is None:
        low.to(dtype)
    x = batch() | {"pixel_values": batch()["pixel_values"].to(dtype)}
    for name, gradient in gradients(low, x).items():
        assert gradient.dtype == (own or dtype)
        assert torch.nn.functional.cosine_similarity(gradient.float().flatten(), expected[name].flatten(), dim=0) > 0.9


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
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_checkpointing_changes_nothing(config: ModaConfig, reentrant: bool):
    x = batch()
    model = patched(config)
    expected = {name: gradient.clone() for name, gradient in gradients(model, x).items()}
    checkpointed = patched(config)
    checkpointed.load_state_dict(model.state_dict())  # some parameters start at random
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = checkpointed(**x).loss
    # A second forward before the backward: the recomputation must find the first one's modality ids.
    checkpointed(**{name: tensor[:1] for name, tensor in x.items()})
    loss.backward()
    found = {name: p.grad for name, p in checkpointed.named_parameters() if name in expected}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_frozen_model(reentrant: bool):
    """A reentrant checkpoint drops the graph where its inputs need no gradient; nothing then trains, in silence."""
    model = patched(ModaConfig()).requires_grad_(False)
    own = {name: parameter for name, parameter in model.named_parameters() if ".moda." in name}
    for parameter in (*own.values(), model.lm_head.weight):
        parameter.requires_grad_()
    expected = {name: gradient.clone() for name, gradient in gradients(model, batch()).items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if hasattr(model, "_require_grads_hook"):  # newer versions see to it themselves
        model.disable_input_require_grads()
    if reentrant:
        with pytest.raises(ModaRuntimeError, match="no gradient would reach MODA's parameters"):
            model(**batch())
        for parameter in own.values():
            parameter.requires_grad_(False)
        model(**batch()).loss.backward()
        for parameter in own.values():
            parameter.requires_grad_()
    model.enable_input_require_grads()
    for name, gradient in gradients(model, batch()).items():
        assert torch.equal(gradient, expected[name]), name


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
    assert losses[-1] < 0.95 * losses[0]
