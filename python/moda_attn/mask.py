"""The learned part of modular masked attention: the pseudo-scores (equations 9 and 10) and the location prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from ._checks import compute_dtype
from ._linalg import full_precision, unit_rows
from .config import ModaConfig


class ModularMask(nn.Module):
    """The sink logit of every query row: what the masked positions weigh, as one number.

    Masks "fixed" and "decay" train a base (and a decay) per query modality and query head; "learned" trains a mask key.
    With "split" there is one set for the keys of the own modality and one for the others.
    """

    def __init__(self, config: ModaConfig, num_heads: int, num_kv_heads: int, head_dim: int, **where: Any):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        sets = 2 if config.combine == "split" else 1
        self.register_parameter("base", None)
        self.register_parameter("decay", None)
        self.register_parameter("mask_key", None)
        table = (sets, config.num_modalities, num_heads)
        if config.mask == "learned":
            self.mask_key = nn.Parameter(torch.randn(sets, num_kv_heads, head_dim, **where) * head_dim**-0.5)
        else:
            self.base = nn.Parameter(torch.full(table, float(config.base), **where))
        if config.mask == "decay":
            start = alibi_slopes(num_heads, where.get("device")).to(**where)
            if config.decay is not None:
                start.fill_(config.decay)
            self.decay = nn.Parameter(start.expand(table).clone())

    def forward(self, query: Tensor, query_modality: Tensor, position: Tensor, scale: float) -> Tensor:
        """Sink logits (B, Hq, Nq), with "split" (B, Hq, Nq, 2), in float32 (float64 for float64 queries).

        Args:
            query: (B, Hq, Nq, D); query_modality: (B, Nq), -1 for padding.
            position: (B, Nq), 0-based position of each query among the real tokens of its row.
            scale: of the scores; used by the mask key.
        """
        dtype = compute_dtype(query.dtype)
        sets = range(2 if self.config.combine == "split" else 1)
        if self.mask_key is not None:
            sinks = [self._from_mask_key(which, query.to(dtype), query_modality, position, scale) for which in sets]
        else:
            base = self.base.to(dtype)
            # The magnitude: were a step to carry a decay below zero, its pseudo-scores would grow over the span, take
            # all mass of the head at once and leave it no gradient to come back by.
            decay = torch.zeros_like(base) if self.decay is None else self.decay.to(dtype).abs()
            sinks = [
                F.pseudo_sink(position, query_modality, self.config.span, decay[which], base[which]) for which in sets
            ]
        return torch.stack(sinks, dim=-1) if len(sinks) == 2 else sinks[0]

    def _from_mask_key(
        self, which: int, query: Tensor, query_modality: Tensor, position: Tensor, scale: float
    ) -> Tensor:
        key = self.mask_key[which].to(query.dtype)
        key = key.repeat_interleave(self.num_heads // key.shape[0], dim=0)
        count = (self.config.span - 1 - position).clamp(min=0)[:, None]
        with full_precision(query):
            score = scale * torch.einsum("bhnd,hd->bhn", query, key)
        silent = (count == 0) | (query_modality < 0)[:, None]
        return torch.where(silent, -torch.inf, score + count.clamp(min=1).to(query.dtype).log())


class LocationPrior(nn.Module):
    """A bias on scores between different modalities: a learned number per head times the likeness of their bases."""

    def __init__(self, num_heads: int, **where: Any):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(num_heads, **where))

    def forward(self, affinity: Tensor) -> Tensor:
        """The bias table (B, Hq, M, M) for :func:`basis_affinity` (B, Hkv, M, M)."""
        heads = self.strength.shape[0]
        affinity = affinity.repeat_interleave(heads // affinity.shape[1], dim=1)
        return self.strength.to(affinity.dtype)[:, None, None] * affinity


def basis_affinity(basis: Tensor) -> Tensor:
    """``<||G^m||, ||G^m'||>_F / D`` for m != m', else 0: (B, Hkv, M, D, D) -> (B, Hkv, M, M)."""
    normed = unit_rows(basis).flatten(-2)
    modalities = basis.shape[2]
    others = 1 - torch.eye(modalities, dtype=basis.dtype, device=basis.device)
    with full_precision(basis):
        return (normed @ normed.transpose(-1, -2)) * others / basis.shape[-1]


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes ``2^(-8 (h + 1) / H)`` of ALiBi: (H,)."""
    return torch.exp2(-8.0 * torch.arange(1, num_heads + 1, device=device) / num_heads)
