"""From attention masses to the numbers of the paper's equation 4; NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ModaValueError
from .report import BalanceReport, RowBalance


def balance_of_masses(
    masses: Sequence[np.ndarray],
    query_modality: np.ndarray,
    *,
    answer_rows: np.ndarray | None = None,
    layers: Sequence[int] | None = None,
    patched: bool = False,
) -> BalanceReport:
    """Attention balance from the masses of every layer.

    Args:
        masses: per layer (B, Hq, Nq, M + 1): mass on the keys of each modality and on the pseudo-scores; M is the same
            for all layers.
        query_modality: (B, Nq), ids below M, -1 for padding, whose rows are left out.
        answer_rows: (B, Nq) bool, the queries that predict supervised tokens; None leaves out that part of the report.
        layers: the layers' indices; default 0, 1, ...

    Raises:
        ModaValueError: no layer, or shapes that do not fit.
    """
    query_modality = np.asarray(query_modality)
    layers = tuple(range(len(masses)) if layers is None else layers)
    if not masses or len(layers) != len(masses):
        raise ModaValueError(
            f"masses has {len(masses)} layers and layers {len(layers)} entries; equal and at least 1 wanted"
        )
    num_columns = masses[0].shape[-1]
    for layer, mass in zip(layers, masses, strict=True):
        fits = mass.ndim == 4 and (mass.shape[0], mass.shape[2]) == query_modality.shape
        if not fits or mass.shape[3] != num_columns or num_columns < 2:
            raise ModaValueError(
                f"masses of layer {layer} has shape {tuple(mass.shape)}; (B, Hq, Nq, M + 1) wanted"
                f" with query_modality (B, Nq) = {query_modality.shape} and the same M in every layer"
            )
    if query_modality.size and query_modality.max() > num_columns - 2:
        raise ModaValueError(
            f"query_modality has the id {query_modality.max()}; ids below M = {num_columns - 1} wanted,"
            f" as masses have {num_columns} columns, M + 1"
        )
    if answer_rows is not None and answer_rows.shape != query_modality.shape:
        raise ModaValueError(
            f"answer_rows has shape {answer_rows.shape}; {query_modality.shape} wanted, as query_modality"
        )

    present = [int(modality) for modality in np.unique(query_modality) if modality >= 0]

    def rows_of(selection: np.ndarray, answers_only: bool) -> tuple[RowBalance, ...]:
        chosen = [(modality, (query_modality == modality) & selection) for modality in present]
        return tuple(
            row_balance(
                [mass.transpose(0, 2, 1, 3)[rows].mean(axis=0, dtype=np.float64) for mass in masses],
                layers,
                modality,
                answers_only,
                rows=int(rows.sum()),
            )
            for modality, rows in chosen
            if rows.any()
        )

    everything = np.ones(query_modality.shape, dtype=bool)
    return BalanceReport(
        layers=layers,
        modalities=rows_of(everything, False),
        answers=() if answer_rows is None else rows_of(answer_rows.astype(bool), True),
        patched=patched,
    )


def row_balance(
    means: Sequence[np.ndarray], layers: Sequence[int], modality: int, answers_only: bool = False, *, rows: int
) -> RowBalance:
    """The balance of query rows of one modality from `means`: per layer (H, M + 1), the mean mass over these rows."""
    by_head = np.full((len(means), max(map(len, means)), means[0].shape[-1]), np.nan)
    for layer, mean in zip(by_head, means, strict=True):
        layer[: len(mean)] = mean
    per_layer = np.nanmean(by_head, axis=1)
    own, pseudo = per_layer[:, modality], per_layer[:, -1]
    cross = np.delete(per_layer[:, :-1], modality, axis=1).sum(axis=1)
    gap, visible = np.abs(own - cross), own + cross
    # A layer whose pseudo-scores take everything shows no preference between the modalities.
    relative = np.divide(gap, visible, out=np.zeros_like(gap), where=visible > 0)
    gamma = cross_decay(cross, layers)
    numbers = np.arange(1, len(gap) + 1)
    return RowBalance(
        modality=modality,
        answers_only=answers_only,
        rows=rows,
        mass=by_head,
        self_mass=tuple(own.tolist()),
        cross_mass=tuple(cross.tolist()),
        pseudo_mass=tuple(pseudo.tolist()),
        disparity=float(gap.mean()),
        relative_disparity=float(relative.mean()),
        pseudo_share=float(pseudo.mean()),
        decay=gamma,
        error=float(np.prod(gamma**numbers * gap)),
    )


def cross_decay(cross: np.ndarray, layers: Sequence[int]) -> float:
    """gamma: the factor by which cross-modal mass changes from layer to layer, by least squares on its logarithm.

    NaN with fewer than two layers, or where a layer's cross mass is 0 and has no logarithm.
    """
    if len(layers) < 2 or np.any(cross <= 0):
        return float("nan")
    position = np.asarray(layers, dtype=np.float64) - np.mean(layers)
    return float(np.exp(position @ np.log(cross) / (position @ position)))
