"""One step of generation: a new token whose key is aligned with the basis of the prompt and put into the cache.

What the peers do here: ``sdpa`` attends over the cache and does nothing else; ``sdpa_moda`` aligns the new key in eager
tensor code and folds the sink in; ``moda_attn`` is this package, ``dense`` the truth. No gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from .. import functional, reference
from . import flash
from .peers import EPS, make_inputs


@dataclass(frozen=True)
class Step:
    """A cache (B, Hkv, N, D) of aligned keys and of values, the new token in its last place, and the basis."""

    query: Tensor
    new_key: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor
    mix: Tensor
    basis: Tensor
    sink: Tensor
    bias: Tensor
    modality: Tensor

    def to(self, dtype: torch.dtype) -> Step:
        """The same numbers in another dtype, the cache a copy of its own (tables stay float32 below it)."""
        wide = torch.promote_types(dtype, torch.float32)
        return Step(
            query=self.query.to(dtype),
            new_key=self.new_key.to(dtype),
            key=self.key.to(dtype, copy=True),
            value=self.value.to(dtype),
            keep=self.keep.to(dtype),
            mix=self.mix.to(dtype),
            basis=self.basis.to(wide),
            sink=self.sink.to(wide),
            bias=self.bias.to(wide),
            modality=self.modality,
        )

    @property
    def new(self) -> slice:
        """Where the new token lies in the cache."""
        return slice(self.key.shape[2] - 1, None)


@torch.no_grad()
def make_step(shape: tuple[int, ...], dtype: torch.dtype, *, device: str = "cpu") -> Step:
    """A random step; the shape is B, Hq, Hkv, N, D with N the keys in the cache, the new one included."""
    x = make_inputs(shape, torch.float32, backward=False, device=device)
    aligned, basis = functional.duplex_align(x.key, x.value, x.modality, x.keep, x.mix)
    last = slice(shape[3] - 1, None)
    step = Step(
        query=x.query[:, :, last].contiguous(),
        new_key=x.key[:, :, last].contiguous(),
        key=aligned,
        value=x.value,
        keep=x.keep,
        mix=x.mix,
        basis=basis,
        sink=x.sink[:, :, last].contiguous(),
        bias=x.bias,
        modality=x.modality,
    )
    return step.to(dtype)


def moda_attn(x: Step) -> Tensor:
    """This package."""
    new, modality = x.new, x.modality
    aligned, _ = functional.duplex_align(x.new_key, x.value[:, :, new], modality[:, new], x.keep, x.mix, basis=x.basis)
    x.key[:, :, new] = aligned
    return functional.modular_attention(x.query, x.key, x.value, modality, sink=x.sink, modality_bias=x.bias)


def dense(x: Step) -> Tensor:
    """The readable truth, for the parity gate."""
    new, modality = x.new, x.modality
    aligned, _ = reference.duplex_align(x.new_key, x.value[:, :, new], modality[:, new], x.keep, x.mix, basis=x.basis)
    key = torch.cat([x.key[:, :, :-1], aligned], dim=2)
    return reference.modular_attention(x.query, key, x.value, modality, sink=x.sink, modality_bias=x.bias)


def sdpa(x: Step) -> Tensor:
    """Plain attention of one query over the cache."""
    return torch_functional.scaled_dot_product_attention(x.query, x.key, x.value, enable_gqa=True)


def sdpa_moda(x: Step) -> Tensor:
    """Eager alignment of the new key, then flash attention with a sink."""
    x.key[:, :, x.new] = _eager_align(x)
    plain, logsumexp, _ = flash.forward(x.query, x.key, x.value, causal=False)
    return plain * (logsumexp - torch.logaddexp(logsumexp, x.sink)).exp().unsqueeze(-1).to(plain.dtype)


PEERS: dict[str, Callable[[Step], Tensor]] = {"sdpa": sdpa, "sdpa_moda": sdpa_moda, "moda_attn": moda_attn}


def _eager_align(x: Step) -> Tensor:
    shifted = x.new_key + EPS
    unit = shifted / shifted.norm(dim=-1, keepdim=True)
    normed = (x.basis / x.basis.norm(dim=-1, keepdim=True).clamp_min(1e-30)).to(unit.dtype)
    text, image = (x.new_key @ x.keep[m] + (unit @ normed[:, :, 1 - m]) @ x.mix[m] for m in range(2))
    return torch.where((x.modality[:, x.new] == 0)[:, None, :, None], text, image)
