"""One tiny model a family: its configuration, the tokens of an image, and the inputs that its vision tower wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tiny_configs import (
    CLIP,
    END,
    IMAGE,
    LLAMA,
    MISTRAL,
    PAD,
    QWEN2,
    ROPE,
    SIGLIP,
    START,
    TEXT,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    VISION,
    VOCABULARY,
    config,
    model,
    mrope,
)
from tiny_pixels import Pixels, by_row, flat, grid, sized, tiled


@dataclass(frozen=True)
class Builder:
    """How to make one tiny model and feed it.

    Attributes:
        make: the model, with random weights.
        image: ids of one image in a row of tokens; video: of one video, () where the family knows none.
        images, videos: the vision tower's arguments.
        decoder: path from the model to the text decoder.
    """

    make: Callable[[], nn.Module]
    image: tuple[int, ...]
    images: Pixels
    video: tuple[int, ...] = ()
    videos: Pixels | None = None
    decoder: str = "model.language_model"


UNTIED = {"tie_word_embeddings": False}
IMAGES, VIDEOS = {"image_token_id": IMAGE}, {"video_token_id": VIDEO}
#: Some configurations have other names for the same.
INDEX, VIDEO_INDEX = {"image_token_index": IMAGE}, {"video_token_index": VIDEO}
LAST = {"vision_feature_layer": -1}
PINPOINTS = {"image_grid_pinpoints": [[8, 8], [8, 16]]}
#: Layers of a text decoder with windows, and their width.
WINDOWS = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
FRAME = {"vision_start_token_id": START, "vision_end_token_id": END}
#: Vision towers that merge 2 x 2 of their patches.
MERGING = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 32,
}

IMAGE_4, FRAMED = (IMAGE,) * 4, (START, *(IMAGE,) * 4, END)
SQUARE, TILES = flat(3, 8, 8), sized(flat(2, 3, 8, 8))
FRAMES = flat(2, 3, 8, 8, name="pixel_values_videos")
PATCHES, VIDEO_PATCHES = grid("image", 1, 24), grid("video", 2, 24)


def llava(kind: str, text: Callable[[], Any], **options: Any) -> Callable[[], nn.Module]:
    return model(kind, vision_config=CLIP, text_config=text, **LAST | options)


BUILDERS: dict[str, Builder] = {
    "llava-llama": Builder(llava("Llava", LLAMA, image_seq_length=4, **IMAGES), IMAGE_4, SQUARE),
    "llava-mistral": Builder(llava("Llava", MISTRAL, image_seq_length=4, **IMAGES), IMAGE_4, SQUARE),
    "llava-next-llama": Builder(llava("LlavaNext", LLAMA, **IMAGES, **PINPOINTS), (IMAGE,) * 10, TILES),
    "llava-next-mistral": Builder(llava("LlavaNext", MISTRAL, **IMAGES, **PINPOINTS), (IMAGE,) * 10, TILES),
    "llava-next-video": Builder(
        llava("LlavaNextVideo", LLAMA, **INDEX, **VIDEO_INDEX, **PINPOINTS), (IMAGE,) * 10, TILES, (VIDEO,) * 2, FRAMES
    ),
    "llava-onevision": Builder(
        model("LlavaOnevision", vision_config=SIGLIP, text_config=QWEN2, **INDEX, **VIDEO_INDEX, **PINPOINTS),
        (IMAGE,) * 10,
        TILES,
        (VIDEO,) * 3,
        FRAMES,
    ),
    "vip-llava": Builder(
        llava("VipLlava", LLAMA, vision_feature_layers=[-2, -1], **IMAGES),
        IMAGE_4,
        SQUARE,
    ),
    "video-llava": Builder(
        llava("VideoLlava", LLAMA, **INDEX, **VIDEO_INDEX, image_seq_length=4, video_seq_length=10),
        IMAGE_4,
        flat(3, 8, 8, name="pixel_values_images"),
        (VIDEO,) * 10,
        FRAMES,
    ),
    "qwen2-vl": Builder(
        model(
            "Qwen2VL",
            text_config=mrope("qwen2_vl.Qwen2VLTextConfig"),
            vision_config={
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 2,
            },
            **IMAGES,
            **VIDEOS,
            **FRAME,
            **UNTIED,
        ),
        FRAMED,
        PATCHES,
        (START, *(VIDEO,) * 8, END),
        VIDEO_PATCHES,
    ),
    "qwen2.5-vl": Builder(
        model(
            "Qwen2_5_VL",
            text_config=mrope("qwen2_5_vl.Qwen2_5_VLTextConfig"),
            vision_config=MERGING | {"window_size": 8, "fullatt_block_indexes": [1]},
            **IMAGES,
            **VIDEOS,
            **FRAME,
            **UNTIED,
        ),
        FRAMED,
        PATCHES,
        (START, *(VIDEO,) * 8, END),
        VIDEO_PATCHES,
    ),
    "qwen3-vl": Builder(
        model(
            "Qwen3VL",
            text_config=mrope("qwen3_vl.Qwen3VLTextConfig", head_dim=8),
            vision_config=MERGING | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **IMAGES,
            **VIDEOS,
            **FRAME,
            **UNTIED,
        ),
        FRAMED,
        PATCHES,
        (START, *(VIDEO,) * 4, END) * 2,
        VIDEO_PATCHES,
    ),
    "internvl": Builder(
        model(
            "InternVL",
            vision_config=config("InternVLVisionConfig", **VISION | {"patch_size": [2, 2], "image_size": [8, 8]}),
            text_config=QWEN2,
            **IMAGES,
            **UNTIED,
        ),
        FRAMED,
        SQUARE,
    ),
    "idefics2": Builder(
        model(
            "Idefics2",
            vision_config=VISION,
            perceiver_config={
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
            text_config=MISTRAL,
            **IMAGES,
        ),
        (IMAGE,) * 3,
        by_row(3, 8, 8),
        decoder="model.text_model",
    ),
    **{
        name: Builder(
            model(kind, vision_config=VISION, text_config=LLAMA, scale_factor=1, pad_token_id=PAD, **IMAGES),
            IMAGE_4,
            by_row(3, 8, 8),
            decoder="model.text_model",
        )
        for name, kind in (("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
    },
    "paligemma": Builder(
        model(
            "PaliGemma",
            vision_config=SIGLIP,
            text_config=config("GemmaConfig", **TEXT, **UNTIED, head_dim=8),
            projection_dim=32,
            hidden_size=32,
            vocab_size=VOCABULARY,
            **INDEX,
            **UNTIED,
        ),
        IMAGE_4,
        SQUARE,
    ),
    "gemma3": Builder(
        model(
            "Gemma3",
            text_config=config("Gemma3TextConfig", **TEXT, **WINDOWS, **UNTIED, head_dim=8, query_pre_attn_scalar=8),
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            boi_token_index=START,
            eoi_token_index=END,
            **INDEX,
            **UNTIED,
        ),
        FRAMED,
        SQUARE,
    ),
    "mistral3": Builder(
        model(
            "Mistral3",
            vision_config=config("PixtralVisionConfig", **VISION | {"patch_size": 2}),
            text_config=MISTRAL,
            **INDEX,
            **UNTIED,
        ),
        IMAGE_4,
        sized(SQUARE),
    ),
    "mllama": Builder(
        model(
            "Mllama",
            text_config=config(
                "mllama.MllamaTextConfig",
                **TEXT | {"num_hidden_layers": 4},
                **UNTIED,
                cross_attention_layers=[1],
                **{ROPE: {"rope_type": "default", "rope_theta": 10000.0}},
            ),
            vision_config=config(
                "mllama.MllamaVisionConfig",
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_global_layers=1,
                attention_heads=2,
                vision_output_dim=32,
                image_size=8,
                patch_size=4,
                max_num_tiles=2,
                intermediate_layers_indices=[0],
                supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            ),
            **INDEX,
        ),
        (IMAGE,),
        tiled,
    ),
    "aya-vision": Builder(
        model(
            "AyaVision",
            vision_config=config("SiglipVisionConfig", **VISION | {"patch_size": 2}, vision_use_head=False),
            text_config=config("Cohere2Config", **TEXT, **WINDOWS, **UNTIED, head_dim=8),
            **INDEX,
            **UNTIED,
        ),
        FRAMED,
        SQUARE,
    ),
    "glm4v": Builder(
        model(
            "Glm4v",
            text_config=mrope("glm4v.Glm4vTextConfig"),
            vision_config=MERGING | {"image_size": 8},
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=VIDEO_START,
            video_end_token_id=VIDEO_END,
            **IMAGES,
            **VIDEOS,
            **UNTIED,
        ),
        FRAMED,
        PATCHES,
        (VIDEO_START, *FRAMED * 2, VIDEO_END),
        VIDEO_PATCHES,
    ),
    "got-ocr2": Builder(
        model(
            "GotOcr2",
            vision_config={
                "hidden_size": 16,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 4,
                "mlp_dim": 32,
                "window_size": 2,
                "global_attn_indexes": [1],
            },
            text_config=QWEN2,
            **INDEX,
            **UNTIED,
        ),
        FRAMED,
        flat(3, 32, 32),
    ),
    "ovis2": Builder(
        model(
            "Ovis2",
            vision_config=config("ovis2.Ovis2VisionConfig", **VISION, vocab_size=24, num_visual_indicator_tokens=3),
            text_config=QWEN2,
            visual_indicator_token_ids=[START, END, VIDEO],
            vocab_size=VOCABULARY,
            hidden_size=32,
            **IMAGES,
            **UNTIED,
        ),
        FRAMED,
        SQUARE,
    ),
}
