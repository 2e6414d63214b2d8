"""MODA attention as a module of its own, with projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from . import _checks as check
from .config import ModaConfig
from .errors import ModaTypeError, ModaValueError
from .layer import ModaLayer, attend
from .rotary import rotate
from .state import LayerState, ModaCache

if TYPE_CHECKING:
    from ._typing import TextAttention

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class ModaAttention(nn.Module):
    """Causal multi-head attention with duplex alignment and modular masking.

    Args:
        embed_dim: E, size of the hidden states.
        num_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq; default Hq.
        head_dim: D; default ``embed_dim // num_heads``.
        config: default ``ModaConfig()``; its `layers` has no meaning here.
        bias: whether the projections have one.
        rope_theta: base of the rotary embedding; None for none.

    Raises:
        ModaValueError: sizes that do not fit together.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    moda: ModaLayer

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        config: ModaConfig | None = None,
        bias: bool = False,
        rope_theta: float | None = None,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(embed_dim, num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ModaValueError(
                f"embed_dim {embed_dim}, num_heads {num_heads}, num_kv_heads {num_kv_heads}; "
                "wanted positive sizes and num_heads a multiple of num_kv_heads"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ModaValueError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}: give head_dim")
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if head_dim < 1 or (rope_theta is not None and head_dim % 2):
            raise ModaValueError(f"head_dim {head_dim}; wanted 1 or more, and even with a rotary embedding")
        projections = {
            "q_proj": nn.Linear(embed_dim, num_heads * head_dim, bias=bias),
            "k_proj": nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias),
            "v_proj": nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias),
            "o_proj": nn.Linear(num_heads * head_dim, embed_dim, bias=bias),
        }
        layer = ModaLayer(ModaConfig() if config is None else config, num_heads, num_kv_heads, head_dim)
        self._assemble(projections, layer, head_dim, rope_theta)

    def _assemble(
        self, projections: Mapping[str, nn.Module], layer: ModaLayer, head_dim: int, rope_theta: float | None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.rope_theta = rope_theta
        for name in _PROJECTIONS:
            self.add_module(name, projections[name])
        self.moda = layer

    @classmethod
    def from_module(cls, attention: nn.Module, config: ModaConfig | None = None) -> ModaAttention:
        """Take over a Hugging Face Llama-style attention, sharing its projections.

        A patched attention hands over its MODA parameters as well; then `config` must be left out.

        Raises:
            ModaTypeError: not an attention of that style.
            ModaValueError: a rotary embedding other than the default one, or `config` given for a patched attention.
        """
        children = {name for name, child in attention.named_children() if child is not None} - {"moda"}
        text = getattr(attention, "config", None)
        if children != set(_PROJECTIONS) or text is None:
            raise ModaTypeError(
                f"{type(attention).__name__} has parts {sorted(children)}; wanted a config and {sorted(_PROJECTIONS)}"
            )
        layer = getattr(attention, "moda", None)
        if layer is not None and config is not None:
            raise ModaValueError(f"{type(attention).__name__} is patched already and brings its configuration")
        attention = cast("TextAttention", attention)
        weight = attention.k_proj.weight
        if layer is None:
            layer = ModaLayer(
                ModaConfig() if config is None else config,
                text.num_attention_heads,
                text.num_key_value_heads,
                attention.head_dim,
                dtype=check.compute_dtype(weight.dtype),
                device=weight.device,
            )
        module = cls.__new__(cls)
        projections = {name: getattr(attention, name) for name in _PROJECTIONS}
        module._assemble(projections, layer, attention.head_dim, _rope_theta(text))
        module.scale = attention.scaling
        return module

    @property
    def config(self) -> ModaConfig:
        """The configuration."""
        return self.moda.config

    def forward(
        self,
        hidden_states: Tensor,
        modality: Tensor,
        *,
        position_ids: Tensor | None = None,
        context: Tensor | None = None,
        cache: ModaCache | None = None,
        return_mass: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            hidden_states: (B, N, E).
            modality: (B, N) integer, -1 for padding.
            position_ids: (B, N) for the rotary embedding; default the place among the real tokens of the row.
            context: (B, N) bool, the tokens that may feed a basis; default all real ones. Read at the first call only:
                later calls with the same cache use its bases.
            cache: a :class:`~moda_attn.state.ModaCache` that this call reads and extends.
            return_mass: also return the attention mass.

        Returns:
            (B, N, E); with `return_mass` also (B, Hq, N, 3), mass on the own modality, on others, on pseudo-scores.

        Raises:
            ModaTypeError, ModaValueError: an argument of the wrong kind or shape, or a modality id out of range.
        """
        check.tensors(hidden_states=hidden_states, modality=modality)
        check.shape("hidden_states", hidden_states, ("B", "N", self.q_proj.in_features), "(B, N, E)")
        batch, length, _ = hidden_states.shape
        check.shape("modality", modality, (batch, length), "(B, N)")

        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        before = _state_of(cache, key)
        if self.rope_theta is not None:
            query, key = rotate(query, key, self._positions(modality, position_ids, cache), self.rope_theta)
        key, state = self.moda(key, value, modality, context=context, state=before)
        if cache is not None:
            key, value = cache.append(key, value, state)
        out, mass = attend(self.moda, query, key, value, state, scale=self.scale, return_mass=return_mass)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return out if mass is None else (out, mass)

    def _positions(self, modality: Tensor, position_ids: Tensor | None, cache: ModaCache | None) -> Tensor:
        if position_ids is not None:
            check.shape("position_ids", position_ids, tuple(modality.shape), "(B, N)")
            return position_ids
        real = modality >= 0
        before: Tensor | int = 0
        if cache is not None and cache.state is not None:
            before = (cache.state.modality >= 0).sum(-1, keepdim=True)
        return (before + real.long().cumsum(-1) - 1).clamp(min=0)


def _state_of(cache: object, key: Tensor) -> LayerState | None:
    """What a cache remembers, which must be that of rows and heads like those of the new `key` (B, Hkv, n, D)."""
    if cache is None:
        return None
    if not isinstance(cache, ModaCache):
        raise ModaTypeError(f"cache must be a moda_attn.ModaCache, got {type(cache).__name__}")
    if cache.key is not None:
        batch, heads, _, dim = key.shape
        check.shape("cache.key, of earlier calls,", cache.key, (batch, heads, "N", dim), "(B, Hkv, N, D) of this call")
    return cache.state


def _rope_theta(text: object) -> float | None:
    """The base of a Hugging Face configuration's rotary embedding."""
    settings = getattr(text, "rope_parameters", None) or {}
    kind = settings.get("rope_type", "default")
    if kind != "default" or settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModaValueError(f"rotary embedding {settings} is not supported; wanted the default kind over all of D")
    theta = settings.get("rope_theta", getattr(text, "rope_theta", None))
    if theta is None:
        raise ModaTypeError(f"{type(text).__name__} has no rope_theta")
    return float(theta)
