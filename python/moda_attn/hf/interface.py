"""The attention function and the mask function registered with transformers under the name "moda"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ..errors import ModaRuntimeError, ModaValueError
from ..layer import attend, attention_weights
from .names import NAME
from .record import AttentionCall
from .seam import CacheSeam
from .visible import Keys, key_range, window_of

if TYPE_CHECKING:
    from .._typing import PatchedAttention

#: Arguments of an attention function that change what it computes, and that our kernel has no counterpart of.
UNSUPPORTED = {"softcap": "a soft cap on its scores", "s_aux": "attention sinks of its own"}


def moda_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    moda_seam: CacheSeam | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Modular attention of one patched module; padding comes with the modality ids.

    Args:
        query: (B, Hq, n, D); key, value: (B, Hkv, K, D), those that the cache gave back.
        attention_mask: from :func:`moda_mask`: None or 2-D for causal attention to all keys, else intervals of keys; or
            a dense mask (B|1, 1, n, K) of the model's or the caller's own.
        moda_seam: of this call; holds the parameters and the modality of the keys.

    Returns:
        (B, n, Hq, D), and the attention weights (B, Hq, n, N) where the call asks for `output_attentions`, else None.
    """
    if moda_seam is None or moda_seam.state is None or moda_seam.queries is None:
        raise ModaRuntimeError(
            f'{type(module).__name__} uses attention "moda" but is not patched; call moda_attn.apply'
        )
    if dropout:
        raise ModaValueError(
            f"attention dropout {dropout} is not supported; set attention_dropout = 0 in the text config"
        )
    for name, what in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ModaValueError(f"{type(module).__name__} asks for {what}, which is not supported")
    moda_seam.attended = True
    state, queries = moda_seam.state, moda_seam.queries
    if attention_mask is not None and attention_mask.dim() == 4:
        queries = replace(queries, key_range=moda_seam.call.ranges_of(attention_mask, state.modality >= 0))
    patched = cast("PatchedAttention", module)
    recorder = patched.moda_runtime.recorder
    if recorder is None:
        result, _ = attend(moda_seam.layer, query, key, value, state, scale=scaling, queries=queries)
    else:
        given = (patched.moda_runtime.config, moda_seam.layer, query, key, value, state, queries, scaling)
        result = recorder.attend(AttentionCall(patched.layer_idx, *given))
    weights = None
    if moda_seam.call.weights:
        weights = attention_weights(moda_seam.layer, query, key, state, scale=scaling, queries=queries)
    return result.transpose(1, 2).contiguous(), weights


def moda_mask(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = True,
    device: torch.device | str | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask of one kind of layer: called once a forward, not once a layer.

    Args:
        batch_size: B; kv_length, kv_offset: K, the keys that attention will be given, and the position of the first.
        q_length, q_offset: n and the position of the first query; before transformers 5 `cache_position` (n,) instead.
        mask_function: the pattern, without padding.
        attention_mask: (B, N) bool, padding.
        allow_is_causal_skip: false where the mask's shape must not depend on how full the cache is (compiled decode).
        use_vmap: whether `mask_function` takes single indices only.

    Returns:
        For plain causal attention to all keys the 2-D padding mask as it is; for every other pattern, and for a static
        cache, the interval [first, last) of visible keys of every query, (B, 1, n, 2) int32: four dimensions, so that
        transformers passes it on untouched where `generate` makes masks beforehand.

    Raises:
        ModaValueError: a pattern that is no interval of keys.
    """
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    queries = torch.arange(q_length, device=device) + q_offset
    # A tensor as offset is that of a static cache, whose keys are more than it holds.
    whole = not isinstance(q_offset, Tensor) or not torch.compiler.is_compiling()
    whole = whole and kv_length + kv_offset == int(q_offset) + len(queries)
    window = window_of(mask_function)
    if allow_is_causal_skip and whole and window is not None and window >= kv_length:
        return attention_mask
    keys = Keys(kv_length, kv_offset)
    ranges = key_range(mask_function, queries, keys, attention_mask, batch=batch_size, use_vmap=use_vmap)
    return ranges.expand(batch_size, -1, -1)[:, None]


def register() -> None:
    """Make "moda" known to transformers; without the mask function it would drop padding in silence."""
    AttentionInterface.register(NAME, moda_attention)
    AttentionMaskInterface.register(NAME, moda_mask)
