"""One patched attention of transformers 4.37."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import ModaRuntimeError, ModaValueError
from ...layer import attend, attention_weights
from ..derived import derived
from ..names import NAME
from ..placement import copy_in_use
from ..record import AttentionCall
from .cache import LegacySeam
from .structure import namespace_of

if TYPE_CHECKING:
    from ..._typing import LegacyAttention


@functools.cache
def legacy_patched(cls: type) -> type:
    """A subclass of `cls`, the eager, SDPA or flash attention."""

    class Patched(cls):
        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_value: Any = None,
            output_attentions: bool = False,
            use_cache: bool = False,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None, Any]:
            cache = past_key_value
            if not hasattr(cache, "states"):
                raise ModaRuntimeError(
                    "a patched attention was called without modality ids: call the model, not its layers"
                )
            config, implementation = self.moda_runtime.config, self.config._attn_implementation
            if config is not None and config.changes_attention and implementation != NAME:
                raise ModaRuntimeError(
                    f"the attention implementation was set to {implementation!r} after the patch, which would drop the "
                    f'modular mask; set it back to "{NAME}", or call moda_attn.remove'
                )
            cache.call.entered.layers.add(self.layer_idx)
            seam = LegacySeam(None if self.moda is None else copy_in_use(self.moda), cache)
            if implementation == NAME:
                return *_by_kernel(self, hidden_states, position_ids, seam, output_attentions), cache
            output, weights, _ = super().forward(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=seam,
                output_attentions=output_attentions,
                use_cache=use_cache,
                **kwargs,
            )
            return output, weights, cache

    return derived(legacy_patched, Patched)


def _by_kernel(
    attention: LegacyAttention,
    hidden_states: Tensor,
    position_ids: Tensor | None,
    seam: LegacySeam,
    output_attentions: bool,
) -> tuple[Tensor, Tensor | None]:
    """Modular attention with the module's own projections and rotary embedding, and the weights if they are wanted.

    Causality is the kernel's own and padding comes with the modality ids, so no mask is read.
    """
    if attention.training and attention.attention_dropout:
        raise ModaValueError(
            f"attention dropout {attention.attention_dropout} is not supported; set attention_dropout = 0 in the config"
        )
    batch, count, _ = hidden_states.shape
    query, key, value = (
        projection(hidden_states).view(batch, count, -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    length = count + seam.get_usable_length(count, attention.layer_idx)
    window = getattr(attention.config, "sliding_window", None)
    if window is not None and length > window:
        raise ModaValueError(
            f"{length} tokens exceed the sliding window of {window}, which is not supported on transformers 4.37"
        )
    cos, sin = attention.rotary_emb(value, seq_len=length)
    query, key = namespace_of(attention)["apply_rotary_pos_emb"](query, key, cos, sin, position_ids)
    key, value = seam.update(key, value, attention.layer_idx)
    state = seam.state
    assert state is not None  # update has just set it
    recorder = attention.moda_runtime.recorder
    scale = attention.head_dim**-0.5
    if recorder is None:
        output, _ = attend(seam.layer, query, key, value, state, scale=scale)
    else:
        given = (attention.moda_runtime.config, seam.layer, query, key, value, state, state.queries(count), scale)
        output = recorder.attend(AttentionCall(attention.layer_idx, *given))
    weights = attention_weights(seam.layer, query, key, state, scale=scale) if output_attentions else None
    return attention.o_proj(output.transpose(1, 2).reshape(batch, count, -1)), weights
