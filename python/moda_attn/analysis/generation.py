"""Where every generated token looks while it is chosen: at the image, at the prompt's text, at what was generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from .._checks import compute_dtype
from ..config import PADDING, TEXT, VISION
from ..errors import ModaRuntimeError, ModaValueError
from ..hf.record import AttentionCall, recording
from ..hf.wrappers import in_fsdp1
from .chance import chance_masses
from .measure import combine_of, is_patched, seen_by, undisturbed, unmeasured
from .report import modality_name, plain, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Arguments of `generate` by which several tokens are tried in one call.
_SEVERAL_AT_ONCE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


@dataclass(frozen=True)
class GenerationBalance:
    """Where attention goes while an answer is generated, token by token.

    Attributes:
        layers: indices of the layers, in order.
        tokens: (B, T) the generated ids, -1 after the end of a row that is shorter.
        mass: (L, B, T, M + 2), head means over the row of attention from which a token was chosen: the mass on the
            prompt's keys of each modality, on the keys of tokens generated before, and on the pseudo-scores. NaN after
            the end of a row.
        chance: the same at even attention to every key that the row sees, nothing on the pseudo-scores. The more is
            generated, the smaller a part of it is the image.
        patched: whether the model was patched.
        unmeasured: index of every other layer -> why it is not measured, such as cross-attention.
    """

    layers: tuple[int, ...]
    tokens: np.ndarray
    mass: np.ndarray
    chance: np.ndarray
    patched: bool
    unmeasured: dict[int, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """What the last axis of `mass` counts: the names of the modalities, "generated" and "pseudo"."""
        return (*(modality_name(modality) for modality in range(self.mass.shape[-1] - 2)), "generated", "pseudo")

    @property
    def on_image(self) -> np.ndarray:
        """(L, B, T): mass on the image."""
        return self.mass[..., VISION]

    @property
    def on_prompt_text(self) -> np.ndarray:
        """(L, B, T): mass on the prompt's text."""
        return self.mass[..., TEXT]

    @property
    def on_generated(self) -> np.ndarray:
        """(L, B, T): mass on what was generated before; 0 for the first token."""
        return self.mass[..., -2]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; None stands for NaN."""
        return {
            "patched": self.patched,
            "layers": list(self.layers),
            "unmeasured": self.unmeasured,
            "columns": list(self.columns),
            "tokens": self.tokens.tolist(),
            "mass": plain(self.mass),
            "chance": plain(self.chance),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The JSON of `to_dict`, also written to ``path`` when given."""
        return write_json(self.to_dict(), path)

    def plot(self, words: Sequence[str] | None = None, **options: Any) -> Figure:
        """Stacked shares token by token; ``options`` as in `moda_attn.analysis.plot.generation`."""
        from .plot import generation

        return generation(self, words, **options)


def generation_balance(model: nn.Module, *, max_new_tokens: int, **inputs: Any) -> GenerationBalance:
    """Generate an answer, and say of each of its tokens where attention went when it was chosen.

    That is the row of attention of the token before it, the prompt's last one for the first. Its masses are the
    kernel's output for values that say which group a key belongs to, in memory linear in the sequence length. With beam
    search they are those of the beams that the answer came along. The model is left as it was found.

    Args:
        model: a supported Hugging Face model, patched or not.
        max_new_tokens: at most so many tokens.
        **inputs: of `generate`: the prompt, and how to generate.

    Raises:
        ModaValueError: a way of generating in which a call of the model is not about one token: assisted decoding,
            prompt look-up, a prompt in pieces; or a model inside of the first FSDP, which cannot generate.
    """
    settings: Any = inputs.get("generation_config") or getattr(model, "generation_config", None)
    for name in _SEVERAL_AT_ONCE:
        if inputs.get(name) or getattr(settings, name, None):
            raise ModaValueError(f"{name} has the model look at several tokens in one call; generate without it")
    beams = inputs.get("num_beams") or getattr(settings, "num_beams", None) or 1
    arguments = {name: value for name, value in inputs.items() if name != "input_ids"}
    arguments |= {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    if beams > 1:
        arguments["output_scores"] = True  # brings the beams' way with it
    prompt = [inputs["input_ids"]] if inputs.get("input_ids") is not None else []
    vision_language: Any = model
    if in_fsdp1(model):
        raise ModaValueError("FullyShardedDataParallel does not gather its parameters in generate; use fully_shard")
    with undisturbed(model), recording(model, StepRecorder()) as recorder:
        output = vision_language.generate(*prompt, **arguments)

    layers = tuple(sorted(recorder.steps))
    mass = torch.stack([torch.stack(recorder.steps[layer], dim=1) for layer in layers])  # (L, B, T, 2, M + 2)
    if beams > 1:
        came_from = output.beam_indices.to(mass.device)
        length = came_from.shape[1]
        mass = mass[:, came_from.clamp(min=0), torch.arange(length, device=mass.device)]
        over = came_from < 0
    else:
        length = mass.shape[2]
        over = _after_the_end(
            output.sequences[:, -length:], inputs.get("eos_token_id", getattr(settings, "eos_token_id", None))
        )
    tokens = output.sequences[:, -length:].masked_fill(over, -1)
    mass = mass.masked_fill(over[None, :, :, None, None].to(mass.device), torch.nan)
    measured, chance = mass.double().cpu().numpy().transpose(3, 0, 1, 2, 4)
    return GenerationBalance(layers, tokens.cpu().numpy(), measured, chance, is_patched(model), unmeasured(model))


class StepRecorder:
    """Collects for each layer and each call of the model (B, 2, M + 2): the last row's masses, means over heads, and
    what they would be at even attention."""

    def __init__(self) -> None:
        self.labels: Tensor | None = None
        self.steps: dict[int, list[Tensor]] = {}
        self.first: dict[int, Tensor] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Called by the attention function."""
        output, _ = call.attend()
        last = _last_row(call)
        position = last.queries.position[:, -1]
        steps = self.steps.setdefault(call.index, [])
        first = self.first.setdefault(call.index, position)
        if position.shape != first.shape or (position - first != len(steps)).any():
            raise ModaRuntimeError("generate did not call the model once for each token; use greedy, sampling or beams")
        modalities = call.num_modalities
        groups = _groups(call.state.modality, len(steps), modalities)
        mass = mass_by_group(last, groups, modalities + 1)
        of_groups = [*range(modalities), TEXT]
        even = chance_masses(groups.cpu().numpy(), *seen_by(last), modalities=of_groups, combine=combine_of(call))[:, 0]
        steps.append(torch.stack([mass, pad(torch.from_numpy(even), (0, 1)).to(mass)], dim=1))
        return output


def mass_by_group(call: AttentionCall, groups: Tensor, count: int) -> Tensor:
    """Of the last query row the mass on each group of keys, and on the pseudo-scores.

    Args:
        call: of one layer.
        groups: (B, K), ids below `count`, at most D; -1 for keys that are in none.

    Returns:
        (B, count + 1), means over heads.
    """
    wide = call.in_dtype(compute_dtype(call.query.dtype))
    dim = wide.value.shape[-1]
    if count > dim:
        raise ModaValueError(f"{count} groups of keys; wanted at most {dim}, the head dim")
    value = pad(one_hot(groups.long() + 1, count + 1)[..., 1:], (0, dim - count)).to(wide.value.dtype)
    output, mass = wide.attend(value=value[:, None].expand(wide.value.shape), num_modalities=call.num_modalities)
    assert mass is not None
    return torch.cat([output[:, :, -1, :count], mass[:, :, -1, -1:]], dim=-1).mean(1)


def _last_row(call: AttentionCall) -> AttentionCall:
    """The same call for the last query alone."""
    queries = call.queries
    ranges = None if queries.key_range is None else queries.key_range[:, -1:]
    last = replace(queries, modality=queries.modality[:, -1:], position=queries.position[:, -1:], key_range=ranges)
    return replace(call, query=call.query[:, :, -1:], queries=last)


def _groups(modality: Tensor, generated: int, num_modalities: int) -> Tensor:
    """(B, K): the modality of the prompt's keys, M for the last `generated` real keys of each row, -1 for padding."""
    real = modality > PADDING
    from_the_end = real.flip(-1).cumsum(-1).flip(-1)
    return modality.masked_fill(real & (from_the_end <= generated), num_modalities)


def _after_the_end(tokens: Tensor, ends: Any) -> Tensor:
    """(B, T) bool: the tokens after the first that ends a row."""
    if ends is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ending = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device))
    return ending.cumsum(-1) - ending.long() > 0
