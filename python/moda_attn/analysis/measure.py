"""The attention balance of a live model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModaRuntimeError, ModaValueError
from ..hf.patch import runtime_of
from ..hf.record import AttentionCall, Recorder, recording
from ..hf.structure import find_structure
from ..hf.wrappers import unwrapped
from .chance import chance_masses
from .report import BalanceReport
from .statistics import Kind, report_of
from .tally import Tally

R = TypeVar("R", bound=Recorder)

IGNORE_INDEX = -100


def attention_balance(model: nn.Module, **inputs: Any) -> BalanceReport:
    """Where the model's queries look: at the keys of which modality, or at the pseudo-scores; by layer and head.

    One forward pass in evaluation mode without gradients. The masses come out of the attention kernel itself, in memory
    linear in the sequence length; no attention map is ever formed. The model, patched or not, is left as it was found.

    Layers without the seam, such as cross-attention to an image, whose mass is all on it by construction, are not
    measured; the report names them.

    Args:
        model: a supported Hugging Face model.
        **inputs: what its ``forward`` takes. With ``labels``, the report also covers the answer rows alone: the queries
            that predict a supervised token.
    """
    recorder = forward(model, BalanceRecorder(inputs.get("labels")), inputs)
    return report_of(recorder.tallies(), recorder.layers, patched=is_patched(model), unmeasured=unmeasured(model))


class BalanceRecorder:
    """The sums of every layer's and head's mass over the query rows of each modality, and over its answer rows.

    Args:
        labels: (B, N), where the model is given them merged already.

    Attributes:
        selections: (modality, answer rows alone) -> (B, N) bool, the query rows counted.
        sums: layer index -> for each selection (B, H, M + 1).
        chance: layer index -> for each selection (B, M), the same at even attention.
    """

    def __init__(self, labels: Tensor | None):
        self.labels = labels
        self.selections: dict[Kind, Tensor] = {}
        self.sums: dict[int, dict[Kind, np.ndarray]] = {}
        self.chance: dict[int, dict[Kind, np.ndarray]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Called by the attention function."""
        if call.index in self.sums:
            raise ModaRuntimeError("a layer was called twice in one forward pass; use_cache and chunking must be off")
        if not self.sums:
            self.selections = selections(call.queries.modality, self.labels)
        output, mass = call.attend(num_modalities=call.num_modalities)
        assert mass is not None
        keys, modalities = call.state.modality.cpu().numpy(), range(call.num_modalities)
        even = chance_masses(keys, *seen_by(call), modalities=modalities, combine=combine_of(call))
        self.sums[call.index] = {kind: _summed(mass, chosen) for kind, chosen in self.selections.items()}
        self.chance[call.index] = {
            kind: (even * chosen.cpu().numpy()[..., None]).sum(1) for kind, chosen in self.selections.items()
        }
        return output

    @property
    def layers(self) -> tuple[int, ...]:
        """The indices of the layers that were called."""
        return tuple(sorted(self.sums))

    def tallies(self) -> dict[Kind, Tally]:
        """The sums, input by input, for every kind of query rows."""
        return {
            kind: Tally.of_heads(
                kind[0],
                rows.sum(1).cpu().numpy(),
                *([found[layer][kind] for layer in self.layers] for found in (self.sums, self.chance)),
            )
            for kind, rows in self.selections.items()
        }


def seen_by(call: AttentionCall) -> tuple[np.ndarray, np.ndarray | None]:
    """(B, n) the modality of the queries of `call`, and the intervals (B|1, n, 2) of keys that each sees; None for
    causal attention."""
    ranges = call.queries.key_range
    return call.queries.modality.cpu().numpy(), None if ranges is None else ranges.cpu().numpy()


def combine_of(call: AttentionCall) -> str:
    """ "joint" or "split", how the attention of `call` is normalised."""
    return "joint" if call.layer is None else call.layer.config.combine


def _summed(mass: Tensor, chosen: Tensor) -> np.ndarray:
    """(B, H, N, M + 1) over the rows chosen (B, N): (B, H, M + 1)."""
    kept = mass.where(chosen.to(mass.device)[:, None, :, None], 0.0)
    return kept.sum(2, dtype=torch.float64).cpu().numpy()


def selections(query_modality: Tensor, labels: Tensor | None) -> dict[Kind, Tensor]:
    """(modality, answer rows alone) -> (B, N) bool, the query rows to look at; none that is empty.

    Raises:
        ModaValueError: the labels are not of the shape of `query_modality`.
    """
    everything = query_modality >= 0
    kinds = {False: everything}
    if labels is not None:
        if labels.shape != query_modality.shape:
            raise ModaValueError(f"labels has shape {tuple(labels.shape)}; wanted {tuple(query_modality.shape)}")
        kinds[True] = everything & predicting_rows(labels).to(everything.device)
    present = [int(modality) for modality in query_modality.unique() if modality >= 0]
    chosen = {
        (modality, answers): (query_modality == modality) & rows
        for answers, rows in kinds.items()
        for modality in present
    }
    return {name: rows for name, rows in chosen.items() if rows.any()}


def predicting_rows(labels: Tensor) -> Tensor:
    """(B, N) bool: row i predicts token i + 1, so it is an answer row where that token is supervised."""
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return rows


def forward(model: nn.Module, recorder: R, inputs: Mapping[str, Any]) -> R:
    """One forward pass that `recorder` watches, in evaluation mode without gradients."""
    with undisturbed(model), recording(model, recorder):
        model(**{"use_cache": False, **inputs})
    return recorder


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, after which every module is in the mode that it was in.

    Qwen's and GLM's memory of the last prompt is kept too: a generation that the caller steps by hand goes on.
    """
    modes = [(module, module.training) for module in model.modules()]
    deltas = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    model.eval()
    try:
        # Not the caller's inference mode: what a token receives is found by a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, delta in deltas:
            module.rope_deltas = delta


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or the one inside its wrappers, is patched."""
    runtime = runtime_of(unwrapped(model))
    return runtime is not None and runtime.config is not None


def unmeasured(model: nn.Module) -> dict[int, str]:
    """Index of every layer whose attention is not measured -> why, such as cross-attention."""
    inner = unwrapped(model)
    runtime = runtime_of(inner)
    return (find_structure(inner) if runtime is None else runtime.structure).skipped
