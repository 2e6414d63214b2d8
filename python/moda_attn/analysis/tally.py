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
        chance: (U, L, M + 1), what `sums` would be at even attention; nothing on the pseudo-scores.
        heads: (L, H, M + 1), the sums over the rows of all inputs, head by head; H is the most heads that a layer has,
            NaN fills a layer with fewer.
    """

    modality: int
    rows: np.ndarray
    sums: np.ndarray
    chance: np.ndarray
    heads: np.ndarray

    @staticmethod
    def of_heads(modality: int, rows: np.ndarray, by_head: Sequence[np.ndarray], chance: Sequence[np.ndarray]) -> Tally:
        """From the sums over the rows of each input of L layers, (U, Hq, M + 1) each, and of chance, (U, M) each."""
        heads = np.full((len(by_head), max(layer.shape[1] for layer in by_head), by_head[0].shape[2]), np.nan)
        for target, layer in zip(heads, by_head, strict=True):
            target[: layer.shape[1]] = layer.sum(axis=0)
        sums = np.stack([layer.mean(axis=1) for layer in by_head], axis=1)
        without_pseudo = np.pad(np.stack(list(chance), axis=1), ((0, 0), (0, 0), (0, 1)))
        return Tally(modality, rows, sums, without_pseudo, heads)

    @staticmethod
    def joined(parts: Sequence[Tally]) -> Tally:
        """The inputs of all parts, in their order."""
        width = max(part.sums.shape[2] for part in parts)
        return Tally(
            parts[0].modality,
            np.concatenate([part.rows for part in parts]),
            np.concatenate([_widened(part.sums, width) for part in parts]),
            np.concatenate([_widened(part.chance, width) for part in parts]),
            np.sum([_widened(part.heads, width) for part in parts], axis=0),
        )

    def without_rows(self, inputs: int) -> Tally:
        """Of as many inputs that have no such rows."""
        nothing = np.zeros((inputs, *self.sums.shape[1:]))
        return Tally(self.modality, np.zeros(inputs, dtype=int), nothing, nothing, 0.0 * self.heads)

    def grouped(self, groups: np.ndarray) -> Tally:
        """Inputs of the same group (U,) taken for one, because they are no independent ones."""
        names, place = np.unique(groups, return_inverse=True)

        def added(of_inputs: np.ndarray) -> np.ndarray:
            total = np.zeros((len(names), *of_inputs.shape[1:]), dtype=of_inputs.dtype)
            np.add.at(total, place, of_inputs)
            return total

        return Tally(self.modality, added(self.rows), added(self.sums), added(self.chance), self.heads)

    def means(self) -> np.ndarray:
        """(L, 5): mean masses over all rows of all inputs, each row counting the same: on keys of the own modality, on
        others, on the pseudo-scores; and on the own and on others at chance."""
        return self._related(self.sums.sum(axis=0), self.chance.sum(axis=0)) / self.rows.sum()

    def means_without(self) -> np.ndarray:
        """(U', L, 5): `means` with one input left out, for each that has such rows; NaN where it alone has them."""
        counted = self.rows > 0
        remaining = (self.rows.sum() - self.rows[counted])[:, None, None]
        left = self._related(*(every.sum(axis=0) - every[counted] for every in (self.sums, self.chance)))
        return np.divide(left, remaining, out=np.full_like(left, np.nan), where=remaining > 0)

    def chance_by_key(self) -> np.ndarray:
        """(L, M): mean masses on the keys of each modality at even attention."""
        return self.chance[..., :-1].sum(axis=0) / self.rows.sum()

    def by_head(self) -> np.ndarray:
        """(L, H, M + 1): mean masses over all rows, head by head."""
        return self.heads / self.rows.sum()

    def _related(self, masses: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """(..., M + 1) by modality of the key to (..., 5) by its relation to the query, as `means` has them."""
        return np.concatenate([self._by_relation(masses), self._by_relation(chance)[..., :2]], axis=-1)

    def _by_relation(self, masses: np.ndarray) -> np.ndarray:
        own, pseudo = masses[..., self.modality], masses[..., -1]
        others = np.delete(masses[..., :-1], self.modality, axis=-1).sum(axis=-1)
        return np.stack([own, others, pseudo], axis=-1)


def _widened(masses: np.ndarray, width: int) -> np.ndarray:
    """Further modalities, which took nothing, before the pseudo-scores: an input may know fewer than the next one."""
    missing = [np.zeros((*masses.shape[:-1], width - masses.shape[-1]))]
    return np.concatenate([masses[..., :-1], *missing, masses[..., -1:]], axis=-1)
