"""Several samples packed into one row: they would feed each other's bases, so they are found and refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModaValueError
from .memory import is_filled

#: Arguments by which collators tell flash attention, and others, of several samples in a row.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def refuse_packed_rows(arguments: Mapping[str, Any]) -> None:
    """Raise where a row of a forward call holds several samples.

    Args:
        arguments: of the model's forward, by name.

    Raises:
        ModaValueError: it does; the message has the place.
    """
    why = next((f"the call brings {name}" for name in _PACKING if arguments.get(name) is not None), None)
    if why is None and not torch.compiler.is_compiling() and not is_filled(arguments.get("past_key_values")):
        why = _restart(arguments)
    if why is not None:
        raise ModaValueError(
            f"packed rows are not supported: {why}. Several samples in one row would feed each other's bases: give "
            "each a row of its own, padded, and an attention_mask"
        )


def _restart(arguments: Mapping[str, Any]) -> str | None:
    """Where in a row another sample begins: as transformers finds it by the positions, or by a mask of the caller's."""
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is None and positions is not None:
        if positions.dim() == 3 and positions.shape[0] == 4:
            positions = positions[0]  # of Qwen-VL and GLM: those of the text, then three axes
        if positions.dim() != 2:
            return None
        return _first(
            positions.diff(dim=-1) != 1, "position_ids do not rise by one to column {} of row {}, and no mask"
        )
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype != torch.int32:
        visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
        real = visible.diagonal(dim1=-2, dim2=-1)
        apart = real[:, 1:] & real[:, :-1] & ~visible.diagonal(-1, dim1=-2, dim2=-1)[:, : real.shape[1] - 1]
        return _first(apart, "by the attention_mask the token at {} of row {} does not see the one before it")
    return None


def _first(found: Tensor, message: str) -> str | None:
    """`message` with the column, of which the first is 1, and the row of the first true entry of (B, n)."""
    if not found.any():
        return None
    row, column = found.nonzero()[0].tolist()
    return message.format(column + 1, row)
