"""Rotary position embedding in the half-split layout of Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(query: Tensor, key: Tensor, position: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Rotate query (B, Hq, n, D) and key (B, Hkv, n, D) by their position (B, n)."""
    half = torch.arange(0, query.shape[-1], 2, dtype=torch.float32, device=query.device)
    # Angles in float32 whatever the dtype, as pretrained models expect.
    angle = position[:, None, :, None].float() * theta ** (-half / query.shape[-1])
    angle = torch.cat([angle, angle], dim=-1)
    cos, sin = angle.cos().to(query.dtype), angle.sin().to(query.dtype)
    return query * cos + _turned(query) * sin, key * cos + _turned(key) * sin


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
