"""A tiny LLaVA checkpoint on disk, for the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from tiny_configs import TEXT, VISION


def make_checkpoint(folder: Path) -> Path:
    """A random LLaVA of three layers and its processor, saved as a user's would be, with a picture beside."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":", "which", "digit", "is", "this", "?"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessor(size=side, crop_size=side, do_resize=True, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    text = TEXT | {"vocab_size": len(words), "eos_token_id": 2}
    vision = VISION | {"hidden_size": 32, "image_size": 16, "patch_size": 8}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_id=4, image_seq_length=4
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.linear_gradient("L").resize((20, 24)).save(folder / "picture.png")
    return folder
