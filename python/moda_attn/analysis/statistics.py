"""From attention masses to a report of the paper's equation 4; NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import ModaValueError
from .chance import chance_masses
from .intervals import of_masses, over_inputs
from .measures import disparities_at_chance, fit_decay, measures
from .report import BalanceReport, Chance, RowBalance
from .tally import Tally

#: A kind of query rows: their modality, and whether only those that predict supervised tokens are counted.
Kind = tuple[int, bool]


def balance_of_masses(
    masses: Sequence[np.ndarray],
    query_modality: np.ndarray,
    *,
    answer_rows: np.ndarray | None = None,
    chance: Sequence[np.ndarray] | None = None,
    layers: Sequence[int] | None = None,
    patched: bool = False,
) -> BalanceReport:
    """Attention balance from the masses of every layer; the B rows of the batch are taken for independent inputs.

    Args:
        masses: per layer (B, Hq, Nq, M + 1): mass on the keys of each modality and on the pseudo-scores; M is the same
            for all layers.
        query_modality: (B, Nq), ids below M, -1 for padding, whose rows are left out.
        answer_rows: (B, Nq) bool, the queries that predict supervised tokens; None leaves out that part of the report.
        chance: per layer (B, Nq, M), the masses at even attention, as `moda_attn.analysis.chance.chance_masses` gives
            them; default those of causal attention of these rows to each other.
        layers: the layers' indices; default 0, 1, ...

    Raises:
        ModaValueError: no layer, or shapes that do not fit.
    """
    layers = tuple(range(len(masses)) if layers is None else layers)
    query_modality = np.asarray(query_modality)
    _check(masses, query_modality, answer_rows, layers)
    if chance is None:
        ids = query_modality
        chance = [chance_masses(ids, ids, modalities=range(masses[0].shape[-1] - 1))] * len(masses)
    _check_chance(chance, masses, query_modality)
    tallies = {}
    for modality in (int(found) for found in np.unique(query_modality) if found >= 0):
        selections = {False: query_modality == modality}
        if answer_rows is not None:
            selections[True] = selections[False] & answer_rows.astype(bool)
        for answers_only, selected in selections.items():
            if selected.any():
                # Rows that are not counted may hold anything.
                kept = [
                    np.where(selected[:, None, :, None], mass, 0.0).sum(axis=2, dtype=np.float64) for mass in masses
                ]
                even = [(masses_at_chance * selected[..., None]).sum(axis=1) for masses_at_chance in chance]
                tallies[modality, answers_only] = Tally.of_heads(modality, selected.sum(axis=1), kept, even)
    return report_of(tallies, layers, patched=patched)


def join_tallies(parts: Sequence[Mapping[Kind, Tally]]) -> dict[Kind, Tally]:
    """All inputs of all parts; a kind that a part does not have has no rows there."""
    parts = [part for part in parts if part]
    counts = [len(next(iter(part.values())).rows) for part in parts]
    return {
        kind: Tally.joined([part.get(kind) or known.without_rows(n) for part, n in zip(parts, counts, strict=True)])
        for kind, known in {kind: tally for part in parts for kind, tally in part.items()}.items()
    }


def report_of(
    tallies: Mapping[Kind, Tally], layers: Sequence[int], *, patched: bool, unmeasured: Mapping[int, str] | None = None
) -> BalanceReport:
    """The report that the sums make."""
    rows = {kind: row_balance(tallies[kind], layers, kind[1]) for kind in sorted(tallies)}
    return BalanceReport(
        layers=tuple(layers),
        modalities=tuple(row for row in rows.values() if not row.answers_only),
        answers=tuple(row for row in rows.values() if row.answers_only),
        patched=patched,
        unmeasured=dict(unmeasured or {}),
    )


def row_balance(tally: Tally, layers: Sequence[int], answers_only: bool) -> RowBalance:
    """Everything said of one kind of query rows."""
    means = tally.means()
    own, cross, pseudo, chance_own, chance_cross = (tuple(column) for column in means.T.tolist())
    values = {name: float(value) for name, value in measures(means, layers).items()}
    return RowBalance(
        modality=tally.modality,
        answers_only=answers_only,
        rows=int(tally.rows.sum()),
        inputs=int((tally.rows > 0).sum()),
        mass=tally.by_head(),
        self_mass=own,
        cross_mass=cross,
        pseudo_mass=pseudo,
        chance=Chance(chance_own, chance_cross, *disparities_at_chance(means), tally.chance_by_key()),
        **values,
        decay_fit=fit_decay(means, layers),
        intervals=over_inputs(tally, layers),
        mass_interval=of_masses(tally),
        tally=tally,
    )


def _check(
    masses: Sequence[np.ndarray], query_modality: np.ndarray, answer_rows: np.ndarray | None, layers: Sequence[int]
) -> None:
    if not len(masses) or len(layers) != len(masses):
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


def _check_chance(chance: Sequence[np.ndarray], masses: Sequence[np.ndarray], query_modality: np.ndarray) -> None:
    wanted = (*query_modality.shape, masses[0].shape[-1] - 1)
    shapes = [np.shape(of_layer) for of_layer in chance]
    if shapes != [wanted] * len(masses):
        raise ModaValueError(
            f"chance has shapes {shapes}; {wanted}, (B, Nq, M), wanted for each of {len(masses)} layers"
        )
