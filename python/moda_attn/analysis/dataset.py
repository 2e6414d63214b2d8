"""The attention balance over many inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from ..errors import ModaValueError
from .keys import KeyTally
from .measure import BalanceRecorder, forward, is_patched, unmeasured
from .report import BalanceReport
from .statistics import Kind, join_tallies, report_of
from .tally import Tally


def balance_over(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    independent: str = "rows",
    keys: KeyTally | None = None,
) -> BalanceReport:
    """The attention balance of a model over a data set, with intervals over its inputs.

    Every query row of every input counts the same, as in one large batch; what is kept of an input are a few sums.

    Args:
        model: a supported Hugging Face model.
        inputs: the keyword arguments of one ``forward`` after another, such as a `DataLoader` gives; with ``labels``
            the report also covers the answer rows alone.
        independent: what the intervals take for independent: "rows", each row of a batch, or "batches", each batch as a
            whole. Several questions about one picture are no independent inputs: put them into one batch of their own
            and choose "batches".
        keys: measures the key space in the same forward passes; its result is ``keys.space()`` afterwards.

    Raises:
        ModaValueError: no inputs, or another ``independent``.
    """
    if independent not in ("rows", "batches"):
        raise ModaValueError(f'independent={independent!r}; "rows" or "batches" wanted')
    parts: list[dict[Kind, Tally]] = []
    layers: tuple[int, ...] = ()
    for batch in inputs:
        recorder = BalanceRecorder(batch.get("labels"))
        if keys is None:
            forward(model, recorder, batch)
        else:
            keys.add(model, batch, alongside=recorder)
        layers, tallies = recorder.layers, recorder.tallies()
        if independent == "batches":
            tallies = {kind: tally.grouped(np.zeros(len(tally.rows))) for kind, tally in tallies.items()}
        parts.append(tallies)
    if not parts:
        raise ModaValueError("balance_over was given no inputs; an iterable of at least one batch wanted")
    return report_of(join_tallies(parts), layers, patched=is_patched(model), unmeasured=unmeasured(model))
