"""Sizes and token ids of every tiny model, and configurations that are made when a model is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import transformers as hf
from torch import nn

#: Of transformers: (major, minor).
RELEASE = tuple(map(int, hf.__version__.split(".")[:2]))
PAD, TEXT_END = 0, 56
START, END, VIDEO_START, VIDEO_END, VIDEO, IMAGE, VOCABULARY = 58, 59, 60, 61, 62, 63, 64

#: Sizes of every text decoder.
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
#: Sizes of the vision towers that are encoders of transformers' usual kind: 2 x 2 patches.
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
#: Under this name a release of transformers reads the parameters of the rotary embedding.
ROPE = "rope_parameters" if RELEASE >= (5, 0) else "rope_scaling"


def config(path: str, **options: Any) -> Callable[[], Any]:
    """Makes a configuration: a class of transformers, or `family.Class` for one that it does not show."""
    family, _, name = path.rpartition(".")

    def make() -> Any:
        owner = importlib.import_module(f"transformers.models.{family}.configuration_{family}") if family else hf
        return getattr(owner, name)(**options)

    return make


def model(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """Makes a `...ForConditionalGeneration`; options that are makers of configurations are called first."""

    def make() -> nn.Module:
        made = {name: option() if callable(option) else option for name, option in options.items()}
        return getattr(hf, f"{kind}ForConditionalGeneration")(getattr(hf, f"{kind}Config")(**made))

    return make


def mrope(path: str, **options: Any) -> Callable[[], dict[str, Any]]:
    """Qwen's and GLM's text decoders: parts of the head dimension turn by time, height and width."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    make = config(path, **TEXT | options, **{ROPE: rope})
    return lambda: make().to_dict()


LLAMA = config("LlamaConfig", **TEXT)
MISTRAL = config("MistralConfig", **TEXT, sliding_window=None)
QWEN2 = config("Qwen2Config", **TEXT, use_sliding_window=False)
CLIP = config("CLIPVisionConfig", **VISION)
SIGLIP = config("SiglipVisionConfig", **VISION, vision_use_head=False)
