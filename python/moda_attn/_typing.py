"""The modules of transformers as this package knows them. For type checkers only: nothing imports this at run time.

transformers has no types for what its model families share, and torch types every attribute of a module that it does
not know as ``Tensor | Module``. These classes name what the patch reads and writes; modules are cast to them where they
enter, in :meth:`moda_attn.hf.structure.Structure.attentions` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .hf.runtime import Runtime
from .layer import ModaLayer


class TextAttention(nn.Module):
    """Llama-style self-attention of a text decoder."""

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


class PatchedAttention(TextAttention):
    """The same after the patch."""

    moda: ModaLayer | None
    moda_runtime: Runtime


class LegacyAttention(PatchedAttention):
    """A patched Llama attention of transformers 4.37."""

    attention_dropout: float
    rotary_emb: nn.Module


class VisionLanguageModel(nn.Module):
    """A model of a supported family."""

    config: Any
    generation_config: Any
    #: Of PEFT, where it wraps the model.
    get_base_model: Callable[[], nn.Module]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Of ``GenerationMixin``."""

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str]) -> None:
        """Of ``PreTrainedModel``."""
