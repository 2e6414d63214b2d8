"""Small tensor functions shared by the reference and the modules."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """A block in which autocast leaves matrix products alone: tables and logits are float32 at least."""
    return torch.autocast(tensor.device.type, enabled=False)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (..., D) divided by their Euclidean norm; a zero row stays zero, with zero gradient."""
    # Scaling by the largest magnitude first keeps the squares in range; the result does not depend on it.
    largest = rows.detach().abs().amax(-1, keepdim=True) if rows.shape[-1] else rows
    scaled = rows / torch.where(largest == 0, 1, largest)
    squared = (scaled * scaled).sum(-1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0, scaled * torch.where(zero, 1, squared).rsqrt())
