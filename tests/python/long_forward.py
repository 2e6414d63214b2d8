"""Run as a program by test_balance_memory.py: peak memory of a plain forward of 8192 tokens, and what measuring adds.

Prints JSON: the peak of the process after the plain forward, after `attention_balance`, and after `received_attention`,
in bytes. The peak never falls, so each number tells what the step before it did not need.
"""

from __future__ import annotations

import json

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moda_attn.analysis import attention_balance, received_attention
from moda_attn.bench.memory import peak
from tiny_configs import IMAGE, TEXT, VISION

TOKENS, IMAGE_TOKENS = 8192, 4


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = TEXT | {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": TOKENS}
    text = LlamaConfig(**sizes, dtype="float32")
    vision = CLIPVisionConfig(**VISION)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(2, 50, (1, TOKENS))
    ids[:, :IMAGE_TOKENS] = IMAGE
    x = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    # Libraries and threads are up, for forward and backward.
    short = x | {"input_ids": ids[:, :64]}
    received_attention(model, **short)
    with torch.no_grad():
        model(**x, use_cache=False)
    peaks = [peak()]
    for measure in (attention_balance, received_attention):
        measure(model, **x)
        peaks.append(peak())
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
