"""Chance: the attention mass that query rows would give if they looked at every key that they see alike."""

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
    seen, whole, _ = _seen(key_group, query_modality, key_range, modalities, combine)
    return np.divide(seen, whole, out=np.zeros(seen.shape), where=whole > 0)


def chance_received(
    key_modality: np.ndarray,
    query_modality: np.ndarray,
    key_range: np.ndarray | None,
    rows: np.ndarray,
    *,
    combine: str = "joint",
) -> np.ndarray:
    """What every key receives under even attention from selections of query rows, in O(S N M).

    Args:
        key_modality, query_modality, key_range, combine: as for `chance_masses`.
        rows: (S, B, Nq) bool, the selections.

    Returns:
        (S, B, Nk): the mean over the selected rows of the mass on each key; NaN where nothing is selected.
    """
    modalities = range(max(int(key_modality.max(initial=0)), int(query_modality.max(initial=0))) + 1)
    _, whole, (first, last) = _seen(key_modality, query_modality, key_range, modalities, combine)
    result = np.zeros((*rows.shape[:2], key_modality.shape[1]))
    for selection, row in np.ndindex(rows.shape[:2]):
        chosen = rows[selection, row]
        for modality in modalities:
            sums = whole[row, chosen, modality]
            weights = np.divide(1.0, sums, out=np.zeros(sums.shape), where=sums > 0)
            # Added where a row's interval begins and taken away where it ends.
            steps = np.zeros(result.shape[-1] + 1)
            np.add.at(steps, first[row, chosen, 0], weights)
            np.subtract.at(steps, last[row, chosen, 0], weights)
            mine = key_modality[row] == modality
            result[selection, row, mine] = steps[:-1].cumsum()[mine] / max(int(chosen.sum()), 1)
    result[~rows.any(axis=-1)] = np.nan
    return result


def _seen(
    key_group: np.ndarray,
    query_modality: np.ndarray,
    key_range: np.ndarray | None,
    modalities: Sequence[int],
    combine: str,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(B, Nq, G) how many keys of each group a query sees, and how many are in the same softmax; (B, Nq, 1) the first
    of all that it sees, and one past the last."""
    (batch, length), rows, count = key_group.shape, query_modality.shape[1], len(modalities)
    before = np.zeros((batch, length + 1, count), dtype=np.int64)
    np.cumsum(key_group[..., None] == np.arange(count), axis=1, out=before[:, 1:])
    if key_range is None:
        last = np.arange(length - rows + 1, length + 1)
        key_range = np.stack([np.zeros_like(last), last], axis=-1)[None]
    first, last = np.moveaxis(np.broadcast_to(key_range, (batch, rows, 2)), -1, 0)[..., None]
    seen = np.take_along_axis(before, last, axis=1) - np.take_along_axis(before, first, axis=1)
    seen[query_modality < 0] = 0
    whole = np.broadcast_to(seen.sum(axis=-1, keepdims=True), seen.shape)
    if combine == "split":
        own = query_modality[..., None] == np.asarray(modalities)
        on_own = (seen * own).sum(axis=-1, keepdims=True)
        whole = np.where(own, on_own, whole - on_own)
    return seen, whole, (first, last)
