"""A small Llama with the class names and signatures of transformers 4.37, for tests on newer versions.

Its attention takes `past_key_value`, passes no further keyword arguments on, and indexes its rotary tables by position;
its decoder makes plain tuples of a cache unless it was given a cache object.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Output(SimpleNamespace):
    """What a model returns: attributes, and the first of them by index."""

    def __getitem__(self, index: int) -> Any:
        return list(vars(self).values())[index]


@dataclass
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int | None
    use_cache: bool = True
    attention_dropout: float = 0.0
    _attn_implementation: str = "sdpa"


class Cache:
    def get_max_length(self) -> int | None:
        return None

    def get_usable_length(self, new_seq_length: int, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)


class DynamicCache(Cache):
    def __init__(self):
        self.key_cache: list[Tensor] = []
        self.value_cache: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.key_cache)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def __iter__(self):
        return zip(self.key_cache, self.value_cache, strict=True)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, cache_kwargs: dict | None = None):
        if layer_idx == len(self.key_cache):
            self.key_cache.append(key)
            self.value_cache.append(value)
        else:
            self.key_cache[layer_idx] = torch.cat([self.key_cache[layer_idx], key], dim=2)
            self.value_cache[layer_idx] = torch.cat([self.value_cache[layer_idx], value], dim=2)
        return self[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.key_cache[layer_idx].shape[2] if layer_idx < len(self) else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.key_cache = [key.index_select(0, beam_idx) for key in self.key_cache]
        self.value_cache = [value.index_select(0, beam_idx) for value in self.value_cache]

    def to_legacy_cache(self) -> tuple:
        return tuple(self)

    @classmethod
    def from_legacy_cache(cls, past_key_values: tuple | None = None) -> DynamicCache:
        cache = cls()
        for layer_idx, (key, value) in enumerate(past_key_values or ()):
            cache.update(key, value, layer_idx)
        return cache


class LlamaRotaryEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, dim, 2).float() / dim), persistent=False)

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(seq_len).float(), self.inv_freq).repeat(1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor):
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

    cos, sin = cos[position_ids][:, None], sin[position_ids][:, None]
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.attention_dropout = config.attention_dropout
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(self.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Cache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        batch, count, _ = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(batch, count, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        length = count
        if past_key_value is not None:
            length += past_key_value.get_usable_length(count, self.layer_idx)
        cos, sin = self.rotary_emb(value, seq_len=length)
        query, key = apply_rotary_pos_emb(query, key, cos, sin, position_ids)
        if past_key_value is not None:
            key, value = past_key_value.update(key, value, self.layer_idx, {"sin": sin, "cos": cos})
        groups = self.num_heads // self.num_key_value_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out, weights = self.attend(query, key, value, attention_mask)
        out = self.o_proj(out.transpose(1, 2).reshape(batch, count, -1))
        return out, weights if output_attentions else None, past_key_value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        weights = (query @ key.transpose(2, 3) * self.head_dim**-0.5 + mask).softmax(-1)
        return weights @ value, weights


class LlamaSdpaAttention(LlamaAttention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask), None


class LlamaFlashAttention2(LlamaAttention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("FlashAttention needs a GPU")


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        cls = {"eager": LlamaAttention, "sdpa": LlamaSdpaAttention}[config._attn_implementation]
        self.self_attn = cls(config=config, layer_idx=layer_idx)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
            nn.SiLU(),
            nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
        )
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Cache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> tuple:
        attended, weights, cache = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, *((weights,) if output_attentions else ()), *((cache,) if use_cache else ()))


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.reentrant = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Output:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = use_cache and not checkpointing
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past, as_tuples = 0, use_cache and not isinstance(past_key_values, Cache)
        if as_tuples:
            past_key_values = DynamicCache.from_legacy_cache(past_key_values)
        if use_cache:
            past = past_key_values.get_usable_length(hidden.shape[1])
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1])[None]
        mask = _causal_mask(attention_mask, hidden, past)
        weights = []
        for layer in self.layers:
            if checkpointing:
                arguments = (hidden, mask, position_ids, past_key_values, output_attentions, use_cache)
                out = checkpoint(layer.__call__, *arguments, use_reentrant=self.reentrant)
            else:
                out = layer(
                    hidden,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_value=past_key_values,
                    output_attentions=output_attentions,
                    use_cache=use_cache,
                )
            hidden = out[0]
            weights += out[1:2] if output_attentions else []
            if use_cache:
                past_key_values = out[-1]
        cache = past_key_values if use_cache else None
        return Output(
            last_hidden_state=self.norm(hidden),
            past_key_values=cache.to_legacy_cache() if as_tuples else cache,
            attentions=tuple(weights),
        )


def _causal_mask(attention_mask: Tensor | None, hidden: Tensor, past: int) -> Tensor:
    """(B, 1, n, N), 0 where a query may look and the lowest number elsewhere."""
    batch, count, _ = hidden.shape
    seen = torch.ones(count, past + count, dtype=torch.bool).tril(past)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, :]
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros(batch, 1, count, past + count, dtype=hidden.dtype).masked_fill(~seen, lowest)


class LlamaForCausalLM(nn.Module):
    """Of `generate` it knows greedy decoding, several samples a row and beam search."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict) -> None:
        self.model.gradient_checkpointing = True
        self.model.reentrant = gradient_checkpointing_kwargs["use_reentrant"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: bool | None,
    ) -> Output:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **options,
        )
        out.logits = self.lm_head(out.last_hidden_state)
        out.loss = None
        if labels is not None:
            out.loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return out

    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        max_new_tokens: int = 1,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        do_sample: bool = False,
        **_: Any,
    ) -> SimpleNamespace:
        copies = max(num_beams, num_return_sequences)
        rows = inputs_embeds.shape[0]
        embeds = inputs_embeds.repeat_interleave(copies, dim=0)
        mask = attention_mask if attention_mask is not None else torch.ones(embeds.shape[:2], dtype=torch.int64)
        mask = mask.repeat_interleave(copies, dim=0) if attention_mask is not None else mask
        tokens, cache, scores = torch.zeros(rows * copies, 0, dtype=torch.int64), None, []
        total = torch.full((rows, copies), float("-inf")).index_fill(1, torch.tensor([0]), 0.0)
        for _step in range(max_new_tokens):
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            arguments = {"inputs_embeds": embeds, "position_ids": positions}
            if cache is not None:
                arguments = {"input_ids": tokens[:, -1:], "position_ids": positions[:, -1:]}
            out = self(**arguments, attention_mask=mask, past_key_values=cache, use_cache=True)
            scores.append(out.logits[:, -1])
            cache = out.past_key_values
            if num_beams > 1:
                odds = scores[-1].log_softmax(-1).view(rows, copies, -1) + total[..., None]
                total, best = odds.flatten(1).topk(copies)
                vocabulary = odds.shape[-1]
                chosen = (best // vocabulary + torch.arange(rows)[:, None] * copies).flatten()
                cache = self._reordered(cache, chosen)
                tokens, new = tokens[chosen], (best % vocabulary).flatten()
            elif do_sample:
                new = scores[-1].softmax(-1).multinomial(1)[:, 0]
            else:
                new = scores[-1].argmax(-1)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(new[:, None])], dim=1)
        return SimpleNamespace(sequences=tokens, scores=tuple(scores), sequences_scores=total.flatten())

    def _reordered(self, cache: Any, beam_idx: Tensor) -> Any:
        if isinstance(cache, Cache):
            cache.reorder_cache(beam_idx)
            return cache
        return tuple(tuple(state.index_select(0, beam_idx) for state in layer) for layer in cache)
