"""A LLaVA of about 228 thousand parameters, built from its configuration."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .tokenizer import WordTokenizer

TEXT_WIDTH, VISION_WIDTH, TEXT_LAYERS = 64, 64, 4
# The customary 0.02 suits widths of thousands; at 64 it makes the first hidden states, and their gradients, too small.
INITIALIZER_RANGE = 0.08


def build_model(tokenizer: WordTokenizer, seed: int) -> LlavaForConditionalGeneration:
    """CLIP-style tower (8 x 8 pixels, four patches), projector, 4-layer Llama (grouped heads, tied embeddings)."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_channels=1,
        image_size=8,
        patch_size=4,
        initializer_range=INITIALIZER_RANGE,
    )
    text = LlamaConfig(
        initializer_range=INITIALIZER_RANGE,
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.begin_id,
        eos_token_id=tokenizer.end_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_id,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # At the usual 0.02 the four patches look alike to the tower for hundreds of steps.
        model.model.vision_tower.embeddings.position_embedding.weight.normal_(std=0.5)
    return model
