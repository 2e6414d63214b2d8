"""What every model family can do with MODA: one function a feature, and the table of the outcomes."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.config import TEXT
from moda_attn.errors import ModaError
from moda_attn.hf.patch import runtime_of
from moda_attn.hf.registry import family_of
from moda_attn.hf.structure import find_structure

#: MODA without anything that needs our own attention kernel: the model keeps torch's, with masks of its own.
PLAIN = {"mask": "none", "location_prior": False}
ALIGN_ONLY = ModaConfig(**PLAIN)
#: Allowed difference of float32 logits; what is not rounding changes them by 0.1 to 10.
TOLERANCE = 3e-4
ROWS = ["TTITTT", "TITTTTITT"]


def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**x).logits


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def patched(family: str, config: ModaConfig = ALIGN_ONLY, **options) -> nn.Module:
    model = tiny.build(family)
    moda_attn.apply(model, config, **options)
    tiny.randomise(model)
    return model


def positions(model: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The positions that the patch gives to a model that would count padding by itself."""
    first = family_of(model.config).first_position
    return {} if first is None else {"position_ids": (x["attention_mask"].cumsum(-1) - 1).clamp(min=0) + first}


def continued(x: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The inputs with more text tokens at the end."""
    one, zero = torch.ones_like(tokens), torch.zeros_like(tokens)
    more = {"input_ids": tokens, "attention_mask": one, "mm_token_type_ids": zero}
    # PaliGemma's answers are 1 there, and Gemma's text 0.
    more["token_type_ids"] = zero if x.get("token_type_ids", one).any() else one
    return x | {name: torch.cat([x[name], new], dim=1) for name, new in more.items() if name in x}


def one_shot(model: nn.Module, x: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits that predict each of `tokens`, from one forward in which the prompt alone feeds the bases."""
    whole = continued(x, tokens)
    whole["labels"] = torch.cat([torch.full_like(x["input_ids"], -100), tokens], dim=1)
    if runtime_of(model) is None:
        whole |= positions(model, whole)
    return logits(model, whole)[:, x["input_ids"].shape[1] - 1 : -1]


def generated(model: nn.Module, x: dict[str, Tensor], steps: int = 4, **options) -> tuple[Tensor, Tensor]:
    """Greedy continuation and the logits it was chosen from."""
    out = model.generate(
        **x,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        # A one-shot forward would take a generated placeholder for an image's.
        suppress_tokens=list(range(tiny.TEXT_END, tiny.VOCABULARY)),
        **options,
    )
    return out.sequences[:, x["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def identity(family: str) -> None:
    """Patched, nothing has changed; not by a bit."""
    model, x = tiny.build(family), tiny.inputs(family, ROWS)
    plain = logits(model, x | positions(model, x))
    moda_attn.apply(model, ALIGN_ONLY)
    assert torch.equal(logits(model, x), plain)


def effect(family: str) -> None:
    """Trained parameters matter."""
    model, x = tiny.build(family), tiny.inputs(family, ROWS)
    plain = logits(model, x | positions(model, x))
    real = x["attention_mask"].bool()
    assert difference(logits(patched(family), x)[real], plain[real]) > 0.1


def decode(family: str) -> None:
    """Every step of generation equals one forward over prompt and answer."""
    model, x = patched(family), tiny.inputs(family, ROWS)
    tokens, steps = generated(model, x)
    assert difference(steps, one_shot(model, x, tokens)) < TOLERANCE
    moda_attn.remove(model)
    assert difference(steps, one_shot(model, x, tokens)) > 0.1


def padding(family: str) -> None:
    """A row gives what it gives alone, and the padding's embedding matters to nothing."""
    model, x = patched(family), tiny.inputs(family, ROWS)
    together = logits(model, x)
    for row, letters in enumerate(ROWS):
        alone = logits(model, tiny.inputs(family, letters, first=row))
        assert difference(alone[0], together[row, x["attention_mask"][row].bool()]) < TOLERANCE
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.PAD].normal_()
    real = x["attention_mask"].bool()
    assert difference(logits(model, x)[real], together[real]) < TOLERANCE


def training(family: str) -> None:
    """Every MODA parameter gets a gradient, with gradient checkpointing the same."""
    x = tiny.inputs(family, ROWS)
    x["labels"] = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
    x["labels"][:, :-3] = -100
    if "token_type_ids" in x and family == "paligemma":
        x["token_type_ids"] = (x["labels"] != -100).long()
    model = patched(family).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**x).loss.backward()
        own = {name: weight.grad for name, weight in model.named_parameters() if ".moda." in name}
        assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in own.values())
        gradients.append(own)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def persistence(family: str) -> None:
    """Saved and loaded into a fresh model, the logits are the same, bit for bit."""
    model, x = patched(family, ModaConfig(fuser_rank=2, **PLAIN)), tiny.inputs(family, ROWS)
    fresh = tiny.build(family)
    with tempfile.TemporaryDirectory() as folder:
        moda_attn.save_pretrained(model, folder)
        moda_attn.load_pretrained(fresh, folder)
    assert torch.equal(logits(fresh, x), logits(model, x))


def removal(family: str) -> None:
    """Removed, the model is what it was: results, parameters, classes, attributes."""
    model, x = tiny.build(family), tiny.inputs(family, ROWS)
    plain, shape = logits(model, x), _shape(model)
    moda_attn.apply(model, ALIGN_ONLY)
    tiny.randomise(model)
    generated(model, x, 2)
    moda_attn.remove(model)
    assert torch.equal(logits(model, x), plain)
    assert _shape(model) == shape


def _shape(model: nn.Module) -> list[object]:
    """The names of everything, and what is hooked; `rope_deltas` is Qwen's and GLM's memory of the last prompt."""
    return [
        (name, type(module), sorted(set(vars(module)) - {"rope_deltas"}), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + list(model.state_dict())


def kernel(family: str) -> str | None:
    """Our attention kernel in place of torch's: the same before training, and generation equal to one forward after."""
    x = tiny.inputs(family, ROWS)
    real = x["attention_mask"].bool()
    model = tiny.build(family)
    plain = logits(model, x | positions(model, x))
    try:
        moda_attn.apply(model, ALIGN_ONLY, attention="moda")
        assert difference(logits(model, x)[real], plain[real]) < TOLERANCE
        model = patched(family, ModaConfig())
        tokens, steps = generated(model, x)
        assert difference(steps, one_shot(model, x, tokens)) < TOLERANCE
    except ModaError as error:
        return f"refused: {error}"
    return None


def balance(family: str) -> str | None:
    """The attention balance of the model as it came, which is left as it was."""
    model, x = tiny.build(family), tiny.inputs(family, ROWS)
    plain = logits(model, x)
    try:
        report = moda_attn.attention_balance(model, **x)
    except ModaError as error:
        return f"refused: {error}"
    rows = report.of(TEXT)
    for masses in zip(rows.self_mass, rows.cross_mass, rows.pseudo_mass, strict=True):
        assert abs(sum(masses) - 1) < 1e-5
    assert min(rows.cross_mass) > 0
    assert torch.equal(logits(model, x), plain)
    return None


def video(family: str) -> str | None:
    """Videos are a modality of their own with three, and vision with two."""
    if not tiny.BUILDERS[family].video:
        return "-"
    # GLM itself takes a video's placeholders for an image's where a call brings both.
    x = tiny.inputs(family, ["TTVTTT", "TVTTT" if family == "glm4v" else "TITTVTT"])
    two = patched(family)
    three = patched(family, ModaConfig(num_modalities=3, align=("text", "vision", "video"), **PLAIN))
    full = patched(family, ModaConfig(num_modalities=3, align=("text", "vision", "video")))
    for model in (two, three, full):
        tokens, steps = generated(model, x)
        assert difference(steps, one_shot(model, x, tokens)) < TOLERANCE
    kinds = tiny.modality(family, x).masked_fill(x["attention_mask"] == 0, -1)
    assert torch.equal(_modality(three, x), kinds)
    assert torch.equal(_modality(two, x), kinds.clamp(max=1))
    return None


def _modality(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    """The modality ids that the layers are told."""
    seen = []
    core = model.get_submodule(runtime_of(model).structure.owners[-1])
    handle = core.register_forward_hook(lambda _, args, kwargs, out: seen.append(kwargs["moda_call"]), with_kwargs=True)
    logits(model, x)
    handle.remove()
    return seen[0].modality


FEATURES: dict[str, Callable[[str], str | None]] = {
    "identity": identity,
    "effect": effect,
    "generation": decode,
    "padding": padding,
    "training": training,
    "save, load": persistence,
    "remove": removal,
    "video": video,
    "own kernel": kernel,
    "balance": balance,
}


@functools.cache
def outcome(family: str, feature: str) -> str:
    """ "yes", "-" where the family has no such thing, or "refused: " and the message; anything else raises."""
    torch.manual_seed(20250710)
    return FEATURES[feature](family) or "yes"


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def table() -> str:
    """The outcomes in Markdown, what is refused with its reason below."""
    reasons: dict[str, int] = {}
    lines = [f"| model | text attention | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 2) + "|"]
    for family in tiny.ALL:
        model = tiny.build(family)
        structure = find_structure(model)
        attention = type(structure.attentions(model)[structure.layers[0]]).__name__
        cells = []
        for feature in FEATURES:
            cell = outcome(family, feature)
            if cell.startswith("refused: "):
                cell = f"refused ({reasons.setdefault(cell, len(reasons) + 1)})"
            cells.append(cell)
        lines.append(f"| `{type(model).__name__}` | `{attention}` | {' | '.join(cells)} |")
    notes = [f"{number}. {reason.removeprefix('refused: ')}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes, ""]).rstrip() + "\n"


def page_with(text: str, new: str) -> str:
    """The page `text` with the table replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
