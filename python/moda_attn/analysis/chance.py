"""Chance: the attention mass that a query row would give if it looked at every key that it sees alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def chance_masses(
    key_group: np.ndarray,
    query_modality: np.ndarray,
    key_range: np.ndarray | None = None,
    *,
    modalities: Sequence[int],
    combine: str = "joint",
) -> np.ndarray:
    """Attention mass of every query row on each group of keys under even attention, in O(N G).

    With n_i^g the number of real keys of group g that query i sees, that is n_i^g / sum_g' n_i^g', the softmax of equal
    scores; with ``combine="split"``, which has one softmax over the own modality and one over the others, the sum is
    over the groups of the same one. Pseudo-scores are left out: chance says what the prompt and the mask alone give.

    Args:
        key_group: (B, Nk), ids below G, usually those of the modalities; -1 for padding, which nobody sees.
        query_modality: (B, Nq); a row of padding gets zeros.
        key_range: (B|1, Nq, 2), the interval [first, last) of keys that each query sees; None for causal attention, in
            which the last query sees every key.
        modalities: of the G groups.
        combine: "joint" or "split", how the attention is normalised.

    Returns:
        (B, Nq, G); zeros for a row that sees nothing.
    """
    (batch, length), rows, count = key_group.shape, query_modality.shape[1], len(modalities)
    before = np.zeros((batch, length + 1, count), dtype=np.int64)
    np.cumsum(key_group[..., None] == np.arange(count), axis=1, out=before[:, 1:])
    if key_range is None:
        last = np.arange(length - rows + 1, length + 1)
        key_range = np.stack([np.zeros_like(last), last], axis=-1)[None]
    first, last = np.moveaxis(np.broadcast_to(key_range, (batch, rows, 2)), -1, 0)[..., None]
    seen = np.take_along_axis(before, last, axis=1) - np.take_along_axis(before, first, axis=1)
    seen[query_modality < 0] = 0
    whole = seen.sum(axis=-1, keepdims=True)
    if combine == "split":
        own = query_modality[..., None] == np.asarray(modalities)
        on_own = (seen * own).sum(axis=-1, keepdims=True)
        whole = np.where(own, on_own, whole - on_own)
    return np.divide(seen, whole, out=np.zeros(seen.shape), where=whole > 0)
