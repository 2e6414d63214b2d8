"""The attention balance of a live model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ModaRuntimeError
from .report import BalanceReport
from .statistics import balance_of_masses

if TYPE_CHECKING:
    from torch import nn

IGNORE_INDEX = -100


def attention_balance(model: nn.Module, **inputs: Any) -> BalanceReport:
    """Where the model's queries look: own modality, other modalities, pseudo-scores, layer by layer.

    One forward pass in evaluation mode without gradients. The masses come out of the attention kernel itself, in memory
    linear in the sequence length; no attention map is ever formed. The model, patched or not, is left as it was found.

    Args:
        model: a supported Hugging Face model.
        **inputs: what its ``forward`` takes. With ``labels``, the report also covers the answer rows alone: the queries
            that predict a supervised token.
    """
    import torch

    from ..hf.patch import runtime_of
    from ..hf.record import record_mass

    patched = runtime_of(model) is not None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), record_mass(model) as recorder:
            model(**{"use_cache": False, **inputs})
    finally:
        model.train(was_training)

    layers = sorted(recorder.layers)
    if any(len(recorder.layers[index]) != 1 for index in layers):
        raise ModaRuntimeError("a layer recorded several calls in one forward pass; use_cache and chunking must be off")
    entries = [recorder.layers[index][0] for index in layers]
    labels = inputs.get("labels") if recorder.labels is None else recorder.labels
    return balance_of_masses(
        [entry.mass.double().cpu().numpy() for entry in entries],
        entries[0].query_modality.cpu().numpy(),
        answer_rows=None if labels is None else predicting_rows(labels).cpu().numpy(),
        layers=layers,
        patched=patched,
    )


def predicting_rows(labels):
    """(B, N) bool: row i predicts token i + 1, so it is an answer row where that token is supervised."""
    rows = labels.new_zeros(labels.shape, dtype=bool)
    rows[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return rows
