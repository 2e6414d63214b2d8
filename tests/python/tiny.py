"""Tiny models with random weights, made from their configuration, and inputs for them."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from perturb import randomise

__all__ = ["FAMILIES", "IMAGE", "PAD", "VOCABULARY", "build", "inputs", "randomise"]

IMAGE, PAD, VOCABULARY = 63, 0, 64
FAMILIES = ("llava-llama", "llava-mistral", "llava-next-llama", "llava-next-mistral")


@functools.cache
def _template(family: str) -> nn.Module:
    torch.manual_seed(20250710)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    sizes = {
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
    text = MistralConfig(**sizes, sliding_window=None) if family.endswith("mistral") else LlamaConfig(**sizes)
    common = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE, "vision_feature_layer": -1}
    if family.startswith("llava-next"):
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**common, image_grid_pinpoints=[[8, 8], [8, 16]]))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**common, image_seq_length=4))
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        # Zero padding embeddings, the default, would hide keys of padding that are attended by mistake.
        model.get_input_embeddings().weight[PAD].normal_()
        # Weights of the usual size give flat attention: nothing that goes wrong in it would show in the logits.
        for name, weight in model.named_parameters():
            if "self_attn" in name and "language_model" in name:
                weight.mul_(15.0 if "q_proj" in name or "k_proj" in name else 8.0)
            elif "language_model" in name and weight.dim() == 2:
                weight.mul_(6.0)
        model.lm_head.weight.mul_(5.0)
    return model.eval()


def build(family: str = "llava-llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of the family's tiny model in evaluation mode; always the same weights."""
    return copy.deepcopy(_template(family)).to(dtype)


def inputs(family: str, rows: str | list[str], pad: str = "left") -> dict[str, Tensor]:
    """Model inputs of rows such as "TTITT", padded to one length: T is a random text token, I all of an image's."""
    generator = torch.Generator().manual_seed(11)
    rows = [rows] if isinstance(rows, str) else rows
    tokens = 10 if family.startswith("llava-next") else 4
    spelled = []
    for row in rows:
        ids: list[int] = []
        for letter in row:
            text = torch.randint(2, IMAGE, (1,), generator=generator).item()
            ids += [IMAGE] * tokens if letter == "I" else [text]
        spelled.append(ids)
    length = max(map(len, spelled))
    gaps = [[PAD] * (length - len(ids)) for ids in spelled]
    left = pad == "left"
    ids = torch.tensor([(gap + ids) if left else (ids + gap) for gap, ids in zip(gaps, spelled, strict=True)])
    real = [
        [0] * len(gap) + [1] * len(s) if left else [1] * len(s) + [0] * len(gap)
        for gap, s in zip(gaps, spelled, strict=True)
    ]
    result = {"input_ids": ids, "attention_mask": torch.tensor(real)}
    images = sum(row.count("I") for row in rows)
    if images:
        shape = (images, 2, 3, 8, 8) if family.startswith("llava-next") else (images, 3, 8, 8)
        result["pixel_values"] = torch.randn(shape, generator=generator)
        if family.startswith("llava-next"):
            result["image_sizes"] = torch.tensor([[8, 8]] * images)
    return result
