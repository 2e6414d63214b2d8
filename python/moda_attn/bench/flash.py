"""PyTorch's own flash attention with its logsumexp, forward and backward, on whichever device the tensors are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten


def forward(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Output, logsumexp and what backward wants of the kernel's own; grouped heads as they are."""
    if query.device.type == "cpu":
        return *_ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal), ()
    out, logsumexp, *own, _ = _ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)
    return out, logsumexp, tuple(own)


def backward(
    upstream: Tensor, saved: tuple[Tensor, ...], own: tuple[Any, ...], *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `saved` are they, the output and the logsumexp of its rows."""
    if upstream.device.type == "cpu":
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(upstream, *saved, 0.0, causal)
    query_ends, key_ends, queries, keys, seed, offset = own
    lengths = (query_ends, key_ends, queries, keys)
    return _ATEN._scaled_dot_product_flash_attention_backward(
        upstream.contiguous(), *saved, *lengths, 0.0, causal, seed, offset
    )
