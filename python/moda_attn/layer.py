"""One attention layer's share of MODA, the same inside :class:`~moda_attn.ModaAttention` and a patched model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .aligner import DuplexAligner
from .config import ModaConfig
from .mask import LocationPrior, ModularMask, basis_affinity
from .state import LayerState, Queries


class ModaLayer(nn.Module):
    """The parameters of one layer: aligner, modular mask and location prior; none that the configuration cannot use.

    Args:
        config: the configuration.
        num_heads, num_kv_heads, head_dim: Hq, Hkv, D.
        dtype, device: of the parameters.
    """

    def __init__(
        self,
        config: ModaConfig,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        where: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = config
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.aligner = DuplexAligner(config, head_dim, **where)
        self.mask = ModularMask(config, num_heads, num_kv_heads, head_dim, **where) if config.mask != "none" else None
        self.prior = LocationPrior(num_heads, **where) if config.location_prior else None

    def forward(
        self, key: Tensor, value: Tensor, modality: Tensor, *, context: Tensor | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """Align new keys and say what to remember.

        Args:
            key, value: (B, Hkv, n, D) of the new tokens; modality: (B, n).
            context: (B, n) bool, tokens that may feed a basis; only read where there is no `state` yet.
            state: of the tokens before, None at the first call.

        Returns:
            The aligned keys, and the state that includes the new tokens.
        """
        if state is not None:
            return self.aligner(key, value, modality, basis=state.basis)[0], state.extended(modality)
        aligned, basis = self.aligner(key, value, modality, context=context)
        affinity = basis_affinity(basis) if self.prior is not None and basis is not None else None
        return aligned, LayerState(modality, basis, affinity)


def attend(
    layer: ModaLayer | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LayerState,
    *,
    scale: float,
    queries: Queries | None = None,
    return_mass: bool = False,
    num_modalities: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Modular attention of Nq tokens to N, causal unless the queries say which keys they see.

    Args:
        layer: the layer's parameters; None for plain attention.
        query: (B, Hq, Nq, D); key, value: (B, Hkv, N, D), aligned.
        state: of the N keys.
        scale: of the scores.
        queries: the Nq tokens; default the last of the N.
        return_mass: also return the attention mass by the relation of key and query, (B, Hq, Nq, 3).
        num_modalities: M; also return the attention mass by the modality of the key, (B, Hq, Nq, M + 1).

    Returns:
        The output (B, Hq, Nq, D), and the attention mass, None where it was not asked for.
    """
    queries = state.queries(query.shape[2]) if queries is None else queries
    options: dict[str, Any] = {"scale": scale, "query_modality": queries.modality}
    if queries.key_range is not None:
        options |= {"key_range": queries.key_range, "is_causal": False}
    if layer is not None:
        options["combine"] = layer.config.combine
        if layer.mask is not None:
            options["sink"] = layer.mask(query, queries.modality, queries.position, scale)
        if layer.prior is not None:
            options["modality_bias"] = layer.prior(state.affinity)
    if num_modalities is not None:
        options["num_modalities"] = num_modalities
        return F.modular_attention(query, key, value, state.modality, return_mass="modality", **options)
    if return_mass:
        return F.modular_attention(query, key, value, state.modality, return_mass=True, **options)
    return F.modular_attention(query, key, value, state.modality, **options), None


def attention_weights(
    layer: ModaLayer | None,
    query: Tensor,
    key: Tensor,
    state: LayerState,
    *,
    scale: float,
    queries: Queries | None = None,
) -> Tensor:
    """The weights of every key in :func:`attend`, (B, Hq, Nq, N): for looking at, as they take N times the memory.

    A row sums to one less what its pseudo-scores take. They come from the kernel itself: attention to values that are
    columns of the identity, D keys at a time.
    """
    batch, heads, length, dim = key.shape
    blocks = []
    for first in range(0, length, dim):
        width = min(dim, length - first)
        value = key.new_zeros(length, dim)
        value[first : first + width, :width].fill_diagonal_(1)
        value = value.expand(batch, heads, length, dim)
        blocks.append(attend(layer, query, key, value, state, scale=scale, queries=queries)[0][..., :width])
    return torch.cat(blocks, dim=-1)
