"""One small builder a model family: its tiny configuration, and the inputs that its vision tower wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

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
#: Layers of a text decoder with windows.
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
#: What the vision tower is given: number of images in each row, a generator for each row -> arguments of forward.
Pixels = Callable[[list[int], list[torch.Generator]], dict[str, Tensor]]


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


def _noise(counts: list[int], generators: list[torch.Generator], *shape: int) -> list[Tensor]:
    """(count, ...) of each row."""
    return [torch.randn(count, *shape, generator=each) for count, each in zip(counts, generators, strict=True)]


def _flat(*shape: int, name: str = "pixel_values") -> Pixels:
    """One entry for every image of the batch."""
    return lambda counts, generators: {name: torch.cat(_noise(counts, generators, *shape))}


def _by_row(*shape: int) -> Pixels:
    """(B, most images of a row, ...), zeros where a row has fewer."""
    return lambda counts, generators: {
        "pixel_values": nn.utils.rnn.pad_sequence(_noise(counts, generators, *shape), batch_first=True)
    }


def _sized(pixels: Pixels, size: tuple[int, int] = (8, 8)) -> Pixels:
    """With the sizes of the images beside the pixels."""
    return lambda counts, generators: {
        **pixels(counts, generators),
        "image_sizes": torch.tensor([size] * sum(counts)),
    }


def _grid(prefix: str, frames: int, patch_values: int) -> Pixels:
    """Patches in one long row, and their grid: Qwen's and GLM's way. 4 x 4 patches, merged by 2 x 2."""

    name = "pixel_values" if prefix == "image" else "pixel_values_videos"
    return lambda counts, generators: {
        name: torch.cat(_noise(counts, generators, frames * 16, patch_values)).flatten(0, 1),
        f"{prefix}_grid_thw": torch.tensor([[frames, 4, 4]] * sum(counts)),
    }


def _llava(model: str, config: str, text: Any, tokens: int, images: Pixels, **options: Any) -> Builder:
    def make() -> nn.Module:
        common = {"vision_config": hf.CLIPVisionConfig(**VISION), "text_config": text(), "image_token_id": IMAGE}
        return getattr(hf, model)(getattr(hf, config)(**common, **({"vision_feature_layer": -1} | options)))

    return Builder(make, (IMAGE,) * tokens, images)


def _llama() -> Any:
    return hf.LlamaConfig(**TEXT)


def _mistral() -> Any:
    return hf.MistralConfig(**TEXT, sliding_window=None)


def _qwen2() -> Any:
    return hf.Qwen2Config(**TEXT, use_sliding_window=False)


def _llava_next_video() -> nn.Module:
    return hf.LlavaNextVideoForConditionalGeneration(
        hf.LlavaNextVideoConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=_llama(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[8, 8], [8, 16]],
        )
    )


def _llava_onevision() -> nn.Module:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=_qwen2(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[8, 8], [8, 16]],
        )
    )


def _video_llava() -> nn.Module:
    return hf.VideoLlavaForConditionalGeneration(
        hf.VideoLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=_llama(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_seq_length=4,
            video_seq_length=10,
            vision_feature_layer=-1,
        )
    )


SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
#: The rotary embedding of Qwen's and GLM's text decoders: parts of the head dimension for time, height and width.
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def _text_of(config: type, **options: Any) -> Any:
    """With multimodal rotary embedding, under the name that this release of transformers reads."""
    name = "rope_parameters" if RELEASE >= (5, 0) else "rope_scaling"
    return config(**(TEXT | options), **{name: dict(MROPE)})


def _qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    text = _text_of(hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig)
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text.to_dict(), vision_config=vision, **SPECIAL)
    )


def _qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 2,
        "window_size": 8,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    text = _text_of(hf.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig)
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision, **SPECIAL)
    )


def _qwen3_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = _text_of(hf.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLTextConfig, head_dim=8)
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config=text.to_dict(), vision_config=vision, **SPECIAL)
    )


def _glm4v() -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "image_size": 8,
        "patch_size": 2,
        "out_hidden_size": 32,
    }
    special = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": VIDEO_START,
        "video_end_token_id": VIDEO_END,
        "tie_word_embeddings": False,
    }
    text = _text_of(hf.models.glm4v.configuration_glm4v.Glm4vTextConfig)
    return hf.Glm4vForConditionalGeneration(hf.Glm4vConfig(text_config=text.to_dict(), vision_config=vision, **special))


def _internvl() -> nn.Module:
    vision = hf.InternVLVisionConfig(**(VISION | {"patch_size": [2, 2], "image_size": [8, 8]}))
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(vision_config=vision, text_config=_qwen2(), image_token_id=IMAGE, tie_word_embeddings=False)
    )


def _idefics2() -> nn.Module:
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 3,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 1,
    }
    config = hf.Idefics2Config(
        vision_config=VISION, perceiver_config=perceiver, text_config=_mistral(), image_token_id=IMAGE
    )
    return hf.Idefics2ForConditionalGeneration(config)


def _idefics3(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(hf, f"{kind}Config")(
            vision_config=VISION, text_config=_llama(), image_token_id=IMAGE, scale_factor=1, pad_token_id=PAD
        )
        return getattr(hf, f"{kind}ForConditionalGeneration")(config)

    return make


def _paligemma() -> nn.Module:
    text = hf.GemmaConfig(**TEXT, head_dim=8, tie_word_embeddings=False)
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    text = hf.Gemma3TextConfig(
        **TEXT,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=WINDOWS,
        tie_word_embeddings=False,
    )
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _mistral3() -> nn.Module:
    vision = hf.PixtralVisionConfig(**(VISION | {"patch_size": 2}))
    config = hf.Mistral3Config(
        vision_config=vision, text_config=_mistral(), image_token_index=IMAGE, tie_word_embeddings=False
    )
    return hf.Mistral3ForConditionalGeneration(config)


def _mllama() -> nn.Module:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 32,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    name = "rope_parameters" if RELEASE >= (5, 0) else "rope_scaling"
    text = hf.models.mllama.configuration_mllama.MllamaTextConfig(
        **(TEXT | {"num_hidden_layers": 4}), cross_attention_layers=[1], tie_word_embeddings=False, **{name: rope}
    )
    vision = hf.models.mllama.configuration_mllama.MllamaVisionConfig(**vision)
    return hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


def _mllama_pixels(counts: list[int], generators: list[torch.Generator]) -> dict[str, Tensor]:
    result = _by_row(2, 3, 8, 8)(counts, generators)
    there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    # Aspect ratio 1 is one tile; 0 is no image. Only the first of the two tiles is real.
    tiles = torch.stack([there, torch.zeros_like(there)], dim=-1)
    return {**result, "aspect_ratio_ids": there.long(), "aspect_ratio_mask": tiles.long()}


def _aya_vision() -> nn.Module:
    text = hf.Cohere2Config(**TEXT, head_dim=8, sliding_window=6, layer_types=WINDOWS, tie_word_embeddings=False)
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**(VISION | {"patch_size": 2}), vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return hf.AyaVisionForConditionalGeneration(config)


def _got_ocr2() -> nn.Module:
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "mlp_dim": 32,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    config = hf.GotOcr2Config(
        vision_config=vision, text_config=_qwen2(), image_token_index=IMAGE, tie_word_embeddings=False
    )
    return hf.GotOcr2ForConditionalGeneration(config)


def _ovis2() -> nn.Module:
    vision = hf.models.ovis2.configuration_ovis2.Ovis2VisionConfig(
        **VISION, vocab_size=24, num_visual_indicator_tokens=3
    )
    config = hf.Ovis2Config(
        vision_config=vision,
        text_config=_qwen2(),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, VIDEO],
        vocab_size=VOCABULARY,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return hf.Ovis2ForConditionalGeneration(config)


LLAVA = ("LlavaForConditionalGeneration", "LlavaConfig")
LLAVA_NEXT = ("LlavaNextForConditionalGeneration", "LlavaNextConfig")
TILES = _sized(_flat(2, 3, 8, 8))
VIDEOS = _flat(2, 3, 8, 8, name="pixel_values_videos")
PINPOINTS = {"image_grid_pinpoints": [[8, 8], [8, 16]]}
FRAMED = (START, *(IMAGE,) * 4, END)

BUILDERS: dict[str, Builder] = {
    "llava-llama": _llava(*LLAVA, _llama, 4, _flat(3, 8, 8), image_seq_length=4),
    "llava-mistral": _llava(*LLAVA, _mistral, 4, _flat(3, 8, 8), image_seq_length=4),
    "llava-next-llama": _llava(*LLAVA_NEXT, _llama, 10, TILES, **PINPOINTS),
    "llava-next-mistral": _llava(*LLAVA_NEXT, _mistral, 10, TILES, **PINPOINTS),
    "llava-next-video": Builder(_llava_next_video, (IMAGE,) * 10, TILES, (VIDEO,) * 2, VIDEOS),
    "llava-onevision": Builder(_llava_onevision, (IMAGE,) * 10, TILES, (VIDEO,) * 3, VIDEOS),
    "vip-llava": _llava(
        "VipLlavaForConditionalGeneration", "VipLlavaConfig", _llama, 4, _flat(3, 8, 8), vision_feature_layers=[-2, -1]
    ),
    "video-llava": Builder(
        _video_llava,
        (IMAGE,) * 4,
        _flat(3, 8, 8, name="pixel_values_images"),
        (VIDEO,) * 10,
        VIDEOS,
    ),
    "qwen2-vl": Builder(_qwen2_vl, FRAMED, _grid("image", 1, 24), (START, *(VIDEO,) * 8, END), _grid("video", 2, 24)),
    "qwen2.5-vl": Builder(
        _qwen2_5_vl, FRAMED, _grid("image", 1, 24), (START, *(VIDEO,) * 8, END), _grid("video", 2, 24)
    ),
    "qwen3-vl": Builder(
        _qwen3_vl, FRAMED, _grid("image", 1, 24), (START, *(VIDEO,) * 4, END) * 2, _grid("video", 2, 24)
    ),
    "internvl": Builder(_internvl, (START, *(IMAGE,) * 4, END), _flat(3, 8, 8)),
    "idefics2": Builder(_idefics2, (IMAGE,) * 3, _by_row(3, 8, 8), decoder="model.text_model"),
    "idefics3": Builder(_idefics3("Idefics3"), (IMAGE,) * 4, _by_row(3, 8, 8), decoder="model.text_model"),
    "smolvlm": Builder(_idefics3("SmolVLM"), (IMAGE,) * 4, _by_row(3, 8, 8), decoder="model.text_model"),
    "paligemma": Builder(_paligemma, (IMAGE,) * 4, _flat(3, 8, 8)),
    "gemma3": Builder(_gemma3, (START, *(IMAGE,) * 4, END), _flat(3, 8, 8)),
    "mistral3": Builder(_mistral3, (IMAGE,) * 4, _sized(_flat(3, 8, 8))),
    "mllama": Builder(_mllama, (IMAGE,), _mllama_pixels),
    "aya-vision": Builder(_aya_vision, (START, *(IMAGE,) * 4, END), _flat(3, 8, 8)),
    "glm4v": Builder(
        _glm4v,
        FRAMED,
        _grid("image", 1, 24),
        (VIDEO_START, *(START, *(IMAGE,) * 4, END) * 2, VIDEO_END),
        _grid("video", 2, 24),
    ),
    "got-ocr2": Builder(_got_ocr2, (START, *(IMAGE,) * 4, END), _flat(3, 32, 32)),
    "ovis2": Builder(_ovis2, (START, *(IMAGE,) * 4, END), _flat(3, 8, 8)),
}
