"""Measuring how far apart the keys of the modalities lie: the gap that duplex alignment is to close."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import functional as F
from .._checks import compute_dtype
from .._linalg import full_precision, unit_rows
from ..aligner import EPS
from ..errors import ModaRuntimeError, ModaValueError
from ..hf.ids import context_of
from ..hf.patch import moda_layers
from ..hf.placement import copy_in_use
from ..hf.record import AttentionCall, Recorder
from ..hf.wrappers import unwrapped
from .intervals import of_mean
from .keyspace import KeyGap, KeySpace
from .measure import forward, is_patched


def key_space(model: nn.Module, **inputs: Any) -> KeySpace:
    """How alike the keys of the modalities are, before and after alignment.

    One forward pass in evaluation mode; O(N D^2) time beside it, O(D^2) numbers a head. The keys are those of the
    prompt, which feed the bases: with ``labels`` the tokens before the first supervised one, else all that are no
    padding. Every row of the batch is an input.

    Args:
        model: a supported Hugging Face model, patched or not; left as it was found.
        **inputs: what its ``forward`` takes.
    """
    return key_space_over(model, [inputs])


def key_space_over(model: nn.Module, inputs: Iterable[Mapping[str, Any]]) -> KeySpace:
    """The same over a data set: the keyword arguments of one ``forward`` after another."""
    tally = KeyTally()
    for batch in inputs:
        tally.add(model, batch)
    return tally.space()


class KeyTally:
    """What is kept of the keys of all inputs, before and after alignment, in the order of `KeyGap`.

    Attributes:
        samples: (2, 3, U, L, M, M), means over the heads of each input; NaN where it has no such keys.
        total, count: (2, 3, L, H, M, M), the sum over the inputs head by head, and of how many.
    """

    def __init__(self) -> None:
        self.patched = False
        self.layers: tuple[int, ...] = ()
        self.samples = self.total = self.count = np.zeros(0)

    def add(self, model: nn.Module, inputs: Mapping[str, Any], alongside: Recorder | None = None) -> None:
        """Measure one batch in one forward pass, in which another recorder may take its own measurements."""
        recorder = KeyRecorder(inputs, alongside)
        with recorder.listening(model):
            forward(model, recorder, inputs)
        self.patched, self.layers = is_patched(model), tuple(sorted(recorder.gaps))
        found = _stacked([recorder.gaps[layer] for layer in self.layers])
        samples, known = of_mean(np.moveaxis(found, 4, 0))[0], np.isfinite(found)
        total, count = np.where(known, found, 0.0).sum(axis=2), known.sum(axis=2)
        if self.samples.size:
            # An unpatched model has as many modalities as an input shows, which may be fewer than in the next one.
            kinds = max(samples.shape[-1], self.samples.shape[-1])
            samples = np.concatenate([_widened(part, kinds, np.nan) for part in (self.samples, samples)], axis=2)
            total, count = (
                _widened(before, kinds, 0) + _widened(more, kinds, 0)
                for before, more in ((self.total, total), (self.count, count))
            )
        self.samples, self.total, self.count = samples, total, count

    def space(self) -> KeySpace:
        """The result.

        Raises:
            ModaValueError: nothing was added.
        """
        if not self.samples.size:
            raise ModaValueError("no inputs to look at the keys of; at least one batch wanted")
        mean = np.divide(self.total, self.count, out=np.full(self.total.shape, np.nan), where=self.count > 0)
        stages = ("before", "after")[: 1 + self.patched]
        samples = {stage: KeyGap(*self.samples[place]) for place, stage in enumerate(stages)}
        return KeySpace(self.layers, KeyGap(*mean[0]), KeyGap(*mean[1]) if self.patched else None, samples)


class KeyRecorder:
    """Collects for each layer the gap before and after alignment, (2, 3, B, Hkv, M, M).

    Args:
        inputs: of the forward call.
        alongside: computes the attention, and measures what it wants to; None for attention alone.
    """

    def __init__(self, inputs: Mapping[str, Any], alongside: Recorder | None = None):
        self.inputs = inputs
        self.alongside = alongside
        self._labels: Tensor | None = inputs.get("labels")
        self.raw: dict[nn.Module, Tensor] = {}
        self.gaps: dict[int, np.ndarray] = {}

    @property
    def labels(self) -> Tensor | None:
        """Where the model itself merges them with the positions of images, it sets them."""
        return self._labels

    @labels.setter
    def labels(self, merged: Tensor | None) -> None:
        self._labels = merged
        if self.alongside is not None:
            self.alongside.labels = merged

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
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
        self.gaps[call.index] = np.stack([before, after])
        return call.attend()[0] if self.alongside is None else self.alongside.attend(call)


def key_gap(call: AttentionCall, key: Tensor, kind: str, context: Tensor | None) -> np.ndarray:
    """The gap of `key` (B, Hkv, N, D) in one layer: (3, B, Hkv, M, M), in the order of `KeyGap`.

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
    return torch.stack([similarity.double(), distance, frechet]).masked_fill(absent, torch.nan).cpu().numpy()


def _distances(unit: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Between the unit keys (B, H, N, D) of the modalities, members (B, M, N) bool: `KeyGap.distance` and `.frechet`,
    (B, H, M, M), in float64."""
    weights = members.to(unit.dtype)
    weights = (weights / weights.sum(-1, keepdim=True).clamp(min=1))[:, None]
    mean = (weights @ unit).double()
    distance = (mean[:, :, :, None] - mean[:, :, None]).norm(dim=-1)
    frechet = torch.zeros_like(distance)
    covariances = []
    for m in range(members.shape[1]):
        second = (unit * weights[:, :, m, :, None]).transpose(-1, -2) @ unit
        covariances.append(second.double() - mean[:, :, m, :, None] * mean[:, :, m, None, :])
    for m, covariance in enumerate(covariances[:-1]):
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.transpose(-1, -2)
        for n, other in enumerate(covariances[m + 1 :], start=m + 1):
            # The trace of the root of S S' is that of the root of the symmetric R S' R, R the root of S.
            shared = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum(-1)
            spread = (covariance + other).diagonal(dim1=-2, dim2=-1).sum(-1)
            frechet[:, :, m, n] = frechet[:, :, n, m] = distance[:, :, m, n].square() + spread - 2 * shared
    return distance, frechet.clamp(min=0)


def _stacked(layers: Sequence[np.ndarray]) -> np.ndarray:
    """(..., B, L, H, M, M) of layers (..., B, h, M, M), H the most heads of a layer; NaN fills one with fewer."""
    heads = max(layer.shape[-3] for layer in layers)
    *outer, _, kinds, _ = layers[0].shape
    result = np.full((*outer, len(layers), heads, kinds, kinds), np.nan)
    for place, layer in enumerate(layers):
        result[..., place, : layer.shape[-3], :, :] = layer
    return result


def _widened(values: np.ndarray, kinds: int, fill: float) -> np.ndarray:
    """With further modalities along the last two axes."""
    more = (0, kinds - values.shape[-1])
    return np.pad(values, [(0, 0)] * (values.ndim - 2) + [more, more], constant_values=fill)
