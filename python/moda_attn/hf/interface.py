"""The attention function and the mask function registered with transformers under the name "moda"."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ..errors import ModaRuntimeError, ModaValueError
from ..layer import attend
from .seam import CacheSeam

if TYPE_CHECKING:
    from .._typing import PatchedAttention

NAME = "moda"


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
) -> tuple[Tensor, None]:
    """Modular attention of one patched module; padding comes with the modality ids, causality is its own.

    Args:
        query: (B, Hq, n, D); key, value: (B, Hkv, N or more, D), a static cache is longer than what it holds.
        moda_seam: of this call; holds the parameters and the modality of all keys.

    Returns:
        (B, n, Hq, D), and None for the attention weights, which are never formed.
    """
    if moda_seam is None or moda_seam.state is None or moda_seam.queries is None:
        raise ModaRuntimeError(
            f'{type(module).__name__} uses attention "moda" but is not patched; call moda_attn.apply'
        )
    if attention_mask is not None and attention_mask.dim() == 4:
        raise ModaValueError(f"a 4-D attention mask {tuple(attention_mask.shape)} cannot be expressed; give (B, N)")
    if dropout:
        raise ModaValueError(
            f"attention dropout {dropout} is not supported; set attention_dropout = 0 in the text config"
        )
    if kwargs.get("softcap") is not None:
        raise ModaValueError("softcap is not supported")
    moda_seam.attended = True
    state, queries = moda_seam.state, moda_seam.queries
    if query.shape[2] > 1:
        # A static cache gives back more than it holds. One query sees none of that, as its modality is padding; more
        # queries would stand at the end of it.
        held = moda_seam.held
        key, value, state = key[:, :, :held], value[:, :, :held], state.shortened(held)
    patched = cast("PatchedAttention", module)
    recorder = patched.moda_runtime.recorder
    result, mass = attend(
        moda_seam.layer,
        query,
        key,
        value,
        state,
        scale=scaling,
        queries=queries,
        return_mass=recorder is not None,
    )
    if recorder is not None and mass is not None:
        recorder.add(patched.layer_idx, mass, queries.modality)
    return result.transpose(1, 2).contiguous(), None


def moda_mask(
    *,
    q_length: int,
    q_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> Tensor | None:
    """The 2-D padding mask as it is; raises for every pattern other than causal.

    Raises:
        ModaValueError: a sliding window shorter than the sequence, packed rows, or blocks that see both ways.
    """
    if local_size is not None:
        total = int(q_offset) + q_length
        if total > local_size:
            raise ModaValueError(f"{total} tokens exceed the sliding window of {local_size}, which cannot be expressed")
        causal = allow_is_causal_skip or q_length == 1
    else:
        causal = mask_function is causal_mask_function
    if not causal:
        raise ModaValueError("only causal attention with padding can be expressed, not packed rows or other patterns")
    return attention_mask


def register() -> None:
    """Make "moda" known to transformers; without the mask function it would drop padding in silence."""
    AttentionInterface.register(NAME, moda_attention)
    AttentionMaskInterface.register(NAME, moda_mask)
