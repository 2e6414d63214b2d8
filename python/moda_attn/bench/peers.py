"""What a user would run instead of moda-attn, each as a function of the same inputs.

``sdpa``        plain ``scaled_dot_product_attention``: no alignment, no modular mask. Less work than MODA.
``sdpa_moda``   the best MODA stock PyTorch can express: alignment in eager tensor code, then flash attention with the
                sink folded in through its logsumexp, forward and backward. No modality bias.
``eager_moda``  the dense reading of the formulas, as research code writes it: N x N scores.
``moda_attn``   this package: alignment, sink and modality bias, everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from .. import functional, reference
from . import flash

EPS = 1e-6


@dataclass(frozen=True)
class Inputs:
    """One attention layer's inputs: (B, Hq, N, D) queries, one image block with text around it, two modalities."""

    query: Tensor
    key: Tensor
    value: Tensor
    modality: Tensor
    keep: Tensor
    mix: Tensor
    sink: Tensor
    bias: Tensor
    upstream: Tensor

    @property
    def named_leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        return {name: getattr(self, name) for name in ("query", "key", "value", "keep", "mix", "sink", "bias")}

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The same without their names."""
        return tuple(self.named_leaves.values())

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as leaves of their own (tables stay float32 below it)."""
        wide = torch.promote_types(dtype, torch.float32)

        def leaf(tensor: Tensor, kind: torch.dtype) -> Tensor:
            return tensor.detach().to(kind).requires_grad_(tensor.requires_grad)

        query, key, value, keep, mix = (leaf(t, dtype) for t in self.leaves[:5])
        sink, bias = (leaf(t, wide) for t in self.leaves[5:])
        return Inputs(query, key, value, self.modality, keep, mix, sink, bias, self.upstream.to(dtype))


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, *, backward: bool, device: str = "cpu") -> Inputs:
    """Random inputs of shape B, Hq, Hkv, N, D, everywhere the same; nine sixteenths of the tokens are the image."""
    batch, query_heads, key_heads, tokens, dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, spread: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator).mul_(spread).to(device)

    modality = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
    first = tokens // 32
    modality[:, first : first + 9 * tokens // 16] = 1
    inputs = Inputs(
        query=normal(batch, query_heads, tokens, dim),
        key=normal(batch, key_heads, tokens, dim),
        value=normal(batch, key_heads, tokens, dim),
        modality=modality,
        keep=torch.eye(dim, device=device).repeat(2, 1, 1) + normal(2, dim, dim, spread=0.02),
        mix=normal(2, dim, dim, spread=0.05),
        sink=normal(batch, query_heads, tokens),
        bias=normal(1, query_heads, 2, 2, spread=0.1),
        upstream=normal(batch, query_heads, tokens, dim),
    )
    for tensor in inputs.leaves:
        tensor.requires_grad_(backward)
    return inputs.to(dtype)


def moda_attn(x: Inputs) -> Tensor:
    """This package."""
    aligned, _ = functional.duplex_align(x.key, x.value, x.modality, x.keep, x.mix)
    return functional.modular_attention(x.query, aligned, x.value, x.modality, sink=x.sink, modality_bias=x.bias)


def dense(x: Inputs) -> Tensor:
    """The readable truth, for the parity gate."""
    aligned, _ = reference.duplex_align(x.key, x.value, x.modality, x.keep, x.mix)
    return reference.modular_attention(x.query, aligned, x.value, x.modality, sink=x.sink, modality_bias=x.bias)


def sdpa(x: Inputs) -> Tensor:
    """Plain attention."""
    return torch_functional.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True, enable_gqa=True)


def sdpa_moda(x: Inputs) -> Tensor:
    """Eager alignment, then flash attention with a sink."""
    return _FlashWithSink.apply(x.query, _eager_align(x), x.value, x.sink)


def eager_moda(x: Inputs) -> Tensor:
    """Dense scores."""
    group = x.query.shape[1] // x.key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (_eager_align(x), x.value))
    scores = (x.query @ key.mT).float() * x.query.shape[-1] ** -0.5
    ids = x.modality[0].long()
    scores = scores + x.bias[:, :, ids[:, None], ids[None, :]]
    tokens = scores.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(later, float("-inf"))
    weights = torch.cat([scores, x.sink.unsqueeze(-1)], dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(value.dtype) @ value


Peer: TypeAlias = Callable[[Inputs], Tensor]
PEERS: dict[str, Peer] = {
    "sdpa": sdpa,
    "sdpa_moda": sdpa_moda,
    "eager_moda": eager_moda,
    "moda_attn": moda_attn,
}


def _eager_align(x: Inputs) -> Tensor:
    shifted = x.key + EPS
    unit = shifted / shifted.norm(dim=-1, keepdim=True)
    member = [(x.modality == m)[:, None, :, None] for m in range(2)]
    bases = [(unit * inside).mT @ x.value for inside in member]
    normed = [basis / basis.norm(dim=-1, keepdim=True).clamp_min(1e-30) for basis in bases]
    aligned = [x.key @ x.keep[m] + unit @ (normed[1 - m] @ x.mix[m]) for m in range(2)]
    return torch.where(member[0], aligned[0], aligned[1])


class _FlashWithSink(torch.autograd.Function):
    """PyTorch's own flash kernel, its output rescaled to the softmax with one more logit in a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        plain, logsumexp, ctx.own = flash.forward(query, key, value, causal=True)
        total = torch.logaddexp(logsumexp, sink)
        out = plain * (logsumexp - total).exp().unsqueeze(-1).to(plain.dtype)
        ctx.save_for_backward(query, key, value, out, total, sink)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, ...]:
        *saved, sink = ctx.saved_tensors
        out, total = saved[3:]
        gradients = flash.backward(upstream[0], tuple(saved), ctx.own, causal=True)
        delta = (upstream[0].float() * out.float()).sum(-1)
        return (*gradients, -(sink - total).exp() * delta)
