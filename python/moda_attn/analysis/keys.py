"""How far apart the keys of the modalities lie: the gap that duplex alignment is to close."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import functional as F
from .._checks import compute_dtype
from .._linalg import full_precision, unit_rows
from ..aligner import EPS
from ..errors import ModaRuntimeError
from ..hf.ids import context_of
from ..hf.patch import moda_layers
from ..hf.placement import copy_in_use
from ..hf.record import AttentionCall
from ..hf.wrappers import unwrapped
from .measure import forward, is_patched
from .report import modality_name, plain, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class KeyGap(NamedTuple):
    """Likeness and distance of the modalities' keys, (L, Hkv, M, M) each; NaN where one has no keys.

    With unit keys ``u``, their means ``mu`` and covariances ``S`` by modality:

    Attributes:
        similarity: ``<||G^m||, ||G^m'||> / D`` of the bases with unit rows, what the location prior reads; 1 is alike.
        distance: ``|mu^m - mu^m'|``, the modality gap of Liang et al. (2022), "Mind the Gap".
        frechet: ``|mu^m - mu^m'|^2 + tr(S^m + S^m' - 2 (S^m S^m')^(1/2))``, the squared Fréchet distance of two normal
            distributions (Dowson and Landau, 1982), which sees their spread too.
    """

    similarity: np.ndarray
    distance: np.ndarray
    frechet: np.ndarray


@dataclass(frozen=True)
class KeySpace:
    """The keys of the modalities, layer by layer and key head by key head; means over the rows of the batch.

    Attributes:
        layers: indices of the layers, in order.
        before: of the keys as the model makes them, rotated.
        after: of the aligned keys; None for a model that is not patched.
    """

    layers: tuple[int, ...]
    before: KeyGap
    after: KeyGap | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; None stands for NaN."""
        gaps = {"before": self.before, "after": self.after}
        return {
            "layers": list(self.layers),
            "modalities": [modality_name(modality) for modality in range(self.before.similarity.shape[-1])],
            **{name: None if gap is None else plain_gap(gap) for name, gap in gaps.items()},
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The JSON of `to_dict`, also written to ``path`` when given."""
        return write_json(self.to_dict(), path)

    def plot(self, **options: Any) -> Figure:
        """Likeness and distance over the layers; ``options`` as in `moda_attn.analysis.plot.gap`."""
        from .plot import gap

        return gap(self, **options)


def plain_gap(gap: KeyGap) -> dict[str, Any]:
    """Nested lists by name; None stands for NaN."""
    return {name: plain(values) for name, values in gap._asdict().items()}


def key_space(model: nn.Module, **inputs: Any) -> KeySpace:
    """How alike the keys of the modalities are, before and after alignment.

    One forward pass in evaluation mode; O(N D^2) time beside it, O(D^2) numbers a head. The keys are those of the
    prompt, which feed the bases: with ``labels`` the tokens before the first supervised one, else all that are no
    padding.

    Args:
        model: a supported Hugging Face model, patched or not; left as it was found.
        **inputs: what its ``forward`` takes.
    """
    recorder = KeyRecorder(inputs)
    with recorder.listening(model):
        forward(model, recorder, inputs)
    layers = tuple(sorted(recorder.gaps))
    stages = zip(*[recorder.gaps[layer] for layer in layers], strict=True)
    before, after = (KeyGap(*(_stacked(values) for values in zip(*stage, strict=True))) for stage in stages)
    return KeySpace(layers, before, after if is_patched(model) else None)


class KeyRecorder:
    """Collects for each layer the gap before and after alignment, (Hkv, M, M) arrays.

    Args:
        inputs: of the forward call.
    """

    def __init__(self, inputs: dict[str, Any]):
        self.inputs = inputs
        self.labels: Tensor | None = inputs.get("labels")
        self.raw: dict[nn.Module, Tensor] = {}
        self.gaps: dict[int, tuple[KeyGap, KeyGap]] = {}

    @contextmanager
    def listening(self, model: Any) -> Iterator[None]:
        """Keep, inside the block, the keys that every aligner of the model is given."""
        layers = {index: copy_in_use(layer) for index, layer in moda_layers(unwrapped(model)).items()}
        handles = [
            layer.register_forward_pre_hook(lambda module, given: self.raw.update({module: given[0]}))
            for layer in layers.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attend(self, call: AttentionCall) -> Tensor:
        """Called by the attention function."""
        if call.index in self.gaps:
            raise ModaRuntimeError("a layer was called twice in one forward pass; use_cache and chunking must be off")
        modality = call.state.modality
        arguments = {"labels": self.labels, "moda_context": self.inputs.get("moda_context")}
        context = context_of(arguments, modality, training=False, prompt_length=None)
        kind = "covariance" if call.config is None else call.config.basis
        after = key_gap(call, call.key, kind, context)
        raw = None if call.layer is None else self.raw.pop(copy_in_use(call.layer), None)
        before = after if raw is None else key_gap(call, raw, kind, context)
        self.gaps[call.index] = before, after
        return call.attend()[0]


def key_gap(call: AttentionCall, key: Tensor, kind: str, context: Tensor | None) -> KeyGap:
    """The gap of `key` (B, Hkv, N, D) in one layer, mean over batch rows: (Hkv, M, M) arrays.

    Args:
        call: of the layer: its values, and the modality of the keys.
        kind: of the bases; context: (B, N) bool, the tokens to look at; None for all that are no padding.
    """
    modality, count, dtype = call.state.modality, call.num_modalities, compute_dtype(key.dtype)
    chosen = modality >= 0 if context is None else (modality >= 0) & context.to(modality.device)
    with full_precision(key):
        nothing = key.new_zeros(count, key.shape[-1], key.shape[-1], dtype=dtype)
        basis = F.duplex_align(key, call.value, modality, nothing, nothing, kind=kind, context=chosen, eps=EPS)[1]
        normed = unit_rows(basis).flatten(-2)
        similarity = normed @ normed.transpose(-1, -2) / key.shape[-1]
        members = torch.stack([chosen & (modality == m) for m in range(count)], dim=1)
        distance, frechet = _distances(unit_rows(key.to(dtype) + EPS), members)
    there = members.any(-1)
    absent = ~(there[:, :, None] & there[:, None])[:, None]
    return KeyGap(
        *(
            values.double().masked_fill(absent, torch.nan).nanmean(0).cpu().numpy()
            for values in (similarity, distance, frechet)
        )
    )


def _distances(unit: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Between the unit keys (B, H, N, D) of the modalities, members (B, M, N) bool: `KeyGap.distance` and `.frechet`,
    (B, H, M, M)."""
    weights = members.to(unit.dtype)
    weights = (weights / weights.sum(-1, keepdim=True).clamp(min=1))[:, None]
    mean = (weights @ unit).double()
    covariances = []
    for m in range(members.shape[1]):
        second = (unit * weights[:, :, m, :, None]).transpose(-1, -2) @ unit
        covariances.append(second.double() - mean[:, :, m, :, None] * mean[:, :, m, None, :])
    covariance = torch.stack(covariances, dim=2)
    distance = (mean[:, :, :, None] - mean[:, :, None]).norm(dim=-1)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.transpose(-1, -2)
    # The trace of the root of S S' is that of the root of the symmetric R S' R, R the root of S.
    between = root[:, :, :, None] @ covariance[:, :, None] @ root[:, :, :, None]
    shared = torch.linalg.eigvalsh(between).clamp(min=0).sqrt().sum(-1)
    spread = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    frechet = distance.square() + spread[..., :, None] + spread[..., None, :] - 2 * shared
    return distance, frechet.clamp(min=0)


def _stacked(layers: Sequence[np.ndarray]) -> np.ndarray:
    """(L, H, ...), H the most heads of a layer; NaN fills one with fewer."""
    result = np.full((len(layers), max(map(len, layers)), *layers[0].shape[1:]), np.nan)
    for target, layer in zip(result, layers, strict=True):
        target[: len(layer)] = layer
    return result
