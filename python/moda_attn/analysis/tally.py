"""What every number of a balance is made of: sums of attention mass over query rows, input by input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tally:
    """Sums over the query rows of one kind (a modality's, or its answer rows), for each of U inputs.

    Attributes:
        modality: of the query rows.
        rows: (U,) how many query rows of this kind an input has.
        sums: (U, L, M + 1) over those rows, of the mean over heads: mass on the keys of each modality and, last, on the
            pseudo-scores.
        heads: (L, H, M + 1), the sums over the rows of all inputs, head by head; H is the most heads that a layer has,
            NaN fills a layer with fewer.
    """

    modality: int
    rows: np.ndarray
    sums: np.ndarray
    heads: np.ndarray

    @staticmethod
    def of_heads(modality: int, rows: np.ndarray, by_head: Sequence[np.ndarray]) -> Tally:
        """From the sums of L layers over the rows of each input, head by head: (U, Hq, M + 1)."""
        heads = np.full((len(by_head), max(layer.shape[1] for layer in by_head), by_head[0].shape[2]), np.nan)
        for target, layer in zip(heads, by_head, strict=True):
            target[: layer.shape[1]] = layer.sum(axis=0)
        return Tally(modality, rows, np.stack([layer.mean(axis=1) for layer in by_head], axis=1), heads)

    @staticmethod
    def joined(parts: Sequence[Tally]) -> Tally:
        """The inputs of all parts, in their order."""
        width = max(part.sums.shape[2] for part in parts)
        return Tally(
            parts[0].modality,
            np.concatenate([part.rows for part in parts]),
            np.concatenate([_widened(part.sums, width) for part in parts]),
            np.sum([_widened(part.heads, width) for part in parts], axis=0),
        )

    def without_rows(self, inputs: int) -> Tally:
        """Of as many inputs that have no such rows."""
        sums = np.zeros((inputs, *self.sums.shape[1:]))
        return Tally(self.modality, np.zeros(inputs, dtype=int), sums, 0.0 * self.heads)

    def grouped(self, groups: np.ndarray) -> Tally:
        """Inputs of the same group (U,) taken for one, because they are no independent ones."""
        names, place = np.unique(groups, return_inverse=True)
        rows, sums = np.zeros(len(names), dtype=int), np.zeros((len(names), *self.sums.shape[1:]))
        np.add.at(rows, place, self.rows)
        np.add.at(sums, place, self.sums)
        return Tally(self.modality, rows, sums, self.heads)

    def by_key(self) -> np.ndarray:
        """(L, M + 1): mean masses over all rows of all inputs, each row counting the same."""
        return self.sums.sum(axis=0) / self.rows.sum()

    def means(self) -> np.ndarray:
        """(L, 3): the same by relation: on keys of the own modality, of others, on the pseudo-scores."""
        return self._related(self.by_key())

    def means_without(self) -> np.ndarray:
        """(U', L, 3): `means` with one input left out, for each that has such rows; NaN where it alone has them."""
        counted = self.rows > 0
        remaining = (self.rows.sum() - self.rows[counted])[:, None, None]
        left = self._related(self.sums.sum(axis=0) - self.sums[counted])
        return np.divide(left, remaining, out=np.full_like(left, np.nan), where=remaining > 0)

    def by_head(self) -> np.ndarray:
        """(L, H, M + 1): mean masses over all rows, head by head."""
        return self.heads / self.rows.sum()

    def _related(self, masses: np.ndarray) -> np.ndarray:
        """(..., M + 1) by modality of the key to (..., 3) by its relation to the query."""
        own, pseudo = masses[..., self.modality], masses[..., -1]
        others = np.delete(masses[..., :-1], self.modality, axis=-1).sum(axis=-1)
        return np.stack([own, others, pseudo], axis=-1)


def _widened(masses: np.ndarray, width: int) -> np.ndarray:
    """Further modalities, which took nothing, before the pseudo-scores: an input may know fewer than the next one."""
    missing = [np.zeros((*masses.shape[:-1], width - masses.shape[-1]))]
    return np.concatenate([masses[..., :-1], *missing, masses[..., -1:]], axis=-1)
