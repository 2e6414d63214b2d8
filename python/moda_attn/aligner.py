"""The learned part of duplex alignment: how a key and its mapped key are fused (equation 6, tables 1b and 1c)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from ._checks import compute_dtype
from ._linalg import full_precision, unit_rows
from .config import ModaConfig

EPS = 1e-6


class DuplexAligner(nn.Module):
    """Aligns keys: ``k' = k keep_a + mapped_a(k) mix_a`` with a the key's modality.

    Only what the configuration can train becomes a parameter; a modality that is not aligned has ``keep = I``,
    ``mix = 0``. At its start every fusion but "aligned" and "add" returns the keys bit for bit.

    Args:
        config: the configuration.
        head_dim: D.
        dtype, device: of the parameters. float32 is right for models of lower precision as well: near the identity
            bfloat16 cannot hold the small steps of training.
    """

    def __init__(
        self,
        config: ModaConfig,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.align_ids = config.align_ids
        where: dict[str, Any] = {"dtype": dtype, "device": device}
        self.fuser = _fuser(config, head_dim, where) if self.align_ids else None
        by_mlp = bool(self.align_ids) and config.aligner != "basis"
        self.maps = nn.ModuleList(_mlp(config.aligner, head_dim, where) for _ in self.align_ids) if by_mlp else None

    def forward(
        self,
        key: Tensor,
        value: Tensor,
        modality: Tensor,
        *,
        context: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Align `key`.

        Args:
            key, value: (B, Hkv, N, D); modality: (B, N); context: (B, N) bool, tokens that may feed a basis.
            basis: (B, Hkv, M, D, D) of an earlier call, used in place of a new one (decoding).

        Returns:
            The aligned keys, and the basis, None where the configuration needs none.
        """
        kind = self.config.basis
        if self.fuser is not None and self.maps is None:
            keep, mix = self._tables(key, self.fuser)
            return F.duplex_align(key, value, modality, keep, mix, kind=kind, context=context, basis=basis, eps=EPS)
        if self.config.needs_basis and basis is None:
            basis = self._basis_alone(key, value, modality, context)
        if self.fuser is None or self.maps is None:
            return key, basis
        return self._align_by_mlp(key, modality, self.fuser, self.maps), basis

    def _tables(self, key: Tensor, fuser: nn.Module) -> tuple[Tensor, Tensor]:
        """keep and mix for every modality, (M, D, D)."""
        dtype = compute_dtype(key.dtype)
        with full_precision(key):
            keep, mix = fuser()
        eye = torch.eye(self.head_dim, dtype=dtype, device=key.device)
        zero = torch.zeros_like(eye)
        rows = {m: (keep[row].to(dtype), mix[row].to(dtype)) for row, m in enumerate(self.align_ids)}
        tables = [rows.get(m, (eye, zero)) for m in range(self.config.num_modalities)]
        return torch.stack([table[0] for table in tables]), torch.stack([table[1] for table in tables])

    def _basis_alone(self, key: Tensor, value: Tensor, modality: Tensor, context: Tensor | None) -> Tensor:
        dtype = compute_dtype(key.dtype)
        nothing = torch.zeros(self.config.num_modalities, self.head_dim, self.head_dim, dtype=dtype, device=key.device)
        kind = self.config.basis
        return F.duplex_align(key, value, modality, nothing, nothing, kind=kind, context=context, eps=EPS)[1]

    def _align_by_mlp(self, key: Tensor, modality: Tensor, fuser: nn.Module, maps: nn.ModuleList) -> Tensor:
        dtype = compute_dtype(key.dtype)
        wide = key.to(dtype)
        unit = unit_rows(wide + EPS)
        aligned = wide
        with full_precision(key):
            keep, mix = fuser()
            for row, m in enumerate(self.align_ids):
                mapped = maps[row](unit.to(keep.dtype)).to(dtype)
                fused = wide @ keep[row].to(dtype) + mapped @ mix[row].to(dtype)
                aligned = torch.where((modality == m)[:, None, :, None], fused, aligned)
        return aligned.to(key.dtype)


def _fuser(config: ModaConfig, dim: int, where: dict[str, Any]) -> nn.Module:
    count = len(config.align_ids)
    if config.fusion == "gated":
        return GatedFuser(count, dim, where)
    if config.fusion == "concat":
        return (
            ConcatFuser(count, dim, where)
            if config.fuser_rank is None
            else LowRankFuser(count, dim, config.fuser_rank, where)
        )
    return FixedFuser(count, dim, where, keep=config.fusion == "add")


class FixedFuser(nn.Module):
    """ "aligned" (keep = 0) and "add" (keep = I), both with mix = I: nothing to train."""

    keep: Tensor
    mix: Tensor

    def __init__(self, count: int, dim: int, where: dict[str, Any], *, keep: bool):
        super().__init__()
        eye = torch.eye(dim, **where).repeat(count, 1, 1)
        self.register_buffer("keep", eye if keep else torch.zeros_like(eye), persistent=False)
        self.register_buffer("mix", eye.clone(), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """keep and mix, (A, D, D) each for A aligned modalities."""
        return self.keep, self.mix


class ConcatFuser(nn.Module):
    """ "concat": both free, ``[k ; mapped k]`` times a 2D x D matrix; starts at keep = I, mix = 0."""

    def __init__(self, count: int, dim: int, where: dict[str, Any]):
        super().__init__()
        self.keep = nn.Parameter(torch.eye(dim, **where).repeat(count, 1, 1))
        self.mix = nn.Parameter(torch.zeros(count, dim, dim, **where))

    def forward(self) -> tuple[Tensor, Tensor]:
        """keep and mix, (A, D, D) each for A aligned modalities."""
        return self.keep, self.mix


class LowRankFuser(nn.Module):
    """ "concat" of low rank: ``keep = I + A1 B1``, ``mix = A2 B2``; B1 and B2 start at zero."""

    def __init__(self, count: int, dim: int, rank: int, where: dict[str, Any]):
        super().__init__()
        self.keep_in = nn.Parameter(torch.randn(count, dim, rank, **where) * dim**-0.5)
        self.keep_out = nn.Parameter(torch.zeros(count, rank, dim, **where))
        self.mix_in = nn.Parameter(torch.randn(count, dim, rank, **where) * dim**-0.5)
        self.mix_out = nn.Parameter(torch.zeros(count, rank, dim, **where))

    def forward(self) -> tuple[Tensor, Tensor]:
        """keep and mix, (A, D, D) each for A aligned modalities."""
        eye = torch.eye(self.keep_in.shape[1], dtype=self.keep_in.dtype, device=self.keep_in.device)
        return eye + self.keep_in @ self.keep_out, self.mix_in @ self.mix_out


class GatedFuser(nn.Module):
    """ "gated", as released: ``keep = W``, ``mix = diag(r) W``; W starts at I and r at 0."""

    def __init__(self, count: int, dim: int, where: dict[str, Any]):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim, **where).repeat(count, 1, 1))
        self.gate = nn.Parameter(torch.zeros(count, dim, **where))

    def forward(self) -> tuple[Tensor, Tensor]:
        """keep and mix, (A, D, D) each for A aligned modalities."""
        return self.weight, self.gate[:, :, None] * self.weight


def _mlp(kind: str, dim: int, where: dict[str, Any]) -> nn.Sequential:
    """The map of table 1b that stands in for the basis: unit key -> D."""
    first = nn.Linear(dim, dim, bias=False, **where)
    if kind == "mlp":
        return nn.Sequential(first)
    second = nn.Linear(dim, dim, bias=False, **where)
    return nn.Sequential(first, second) if kind == "mlp2" else nn.Sequential(first, nn.GELU(), second)
