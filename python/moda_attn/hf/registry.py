"""What has to be known of each model family, one row each; what can be found in the model itself is in `structure`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import VIDEO, VISION


@dataclass(frozen=True)
class MediaTokens:
    """Ids of the placeholders that a model puts features into, and the modality that they stand for.

    Attributes:
        image: id of an image's placeholder; None where only explicit modality ids can tell.
        video: id of a video's placeholder; None where the model knows no videos.
        video_span: ids around a video whose frames use the placeholder of images, as GLM does; else None.
        video_modality: modality of video tokens.
    """

    image: int | None = None
    video: int | None = None
    video_span: tuple[int, int] | None = None
    video_modality: int = VISION


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model: name of the model class, for people.
        image, video: names of the placeholders' ids in the configuration; None where the family has none.
        video_span: names of the ids around a video whose frames use the placeholder of images.
        first_position: the position of a row's first real token; None where the model counts positions by itself, in
            more than one dimension.
    """

    model: str
    image: str | None = "image_token_id"
    video: str | None = None
    video_span: tuple[str, str] | None = None
    first_position: int | None = 0

    def media_tokens(self, config: Any, num_modalities: int) -> MediaTokens:
        """The placeholders of a model with this configuration; with two modalities videos count as vision."""
        span = self.video_span
        return MediaTokens(
            None if self.image is None else getattr(config, self.image),
            None if self.video is None else getattr(config, self.video),
            None if span is None else (getattr(config, span[0]), getattr(config, span[1])),
            VIDEO if num_modalities > VIDEO else VISION,
        )


#: A model of no known family: its modality ids are always explicit, and its positions its own.
UNKNOWN = Family("", image=None, first_position=None)

_VIDEO = "video_token_id"
#: The rows, by `model_type` of the configuration. A row that is added here makes its family known.
FAMILIES = {
    "aya_vision": Family("AyaVisionForConditionalGeneration"),
    "gemma3": Family("Gemma3ForConditionalGeneration"),
    "glm4v": Family(
        "Glm4vForConditionalGeneration",
        video_span=("video_start_token_id", "video_end_token_id"),
        first_position=None,
    ),
    "got_ocr2": Family("GotOcr2ForConditionalGeneration"),
    "idefics2": Family("Idefics2ForConditionalGeneration"),
    "idefics3": Family("Idefics3ForConditionalGeneration"),
    "internvl": Family("InternVLForConditionalGeneration"),
    "llava": Family("LlavaForConditionalGeneration"),
    "llava_next": Family("LlavaNextForConditionalGeneration"),
    "llava_next_video": Family("LlavaNextVideoForConditionalGeneration", video=_VIDEO),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", video=_VIDEO),
    "mistral3": Family("Mistral3ForConditionalGeneration"),
    "mllama": Family("MllamaForConditionalGeneration"),
    "ovis2": Family("Ovis2ForConditionalGeneration"),
    "paligemma": Family("PaliGemmaForConditionalGeneration", first_position=1),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", video=_VIDEO, first_position=None),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", video=_VIDEO, first_position=None),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", video=_VIDEO, first_position=None),
    "smolvlm": Family("SmolVLMForConditionalGeneration"),
    "video_llava": Family("VideoLlavaForConditionalGeneration", video=_VIDEO),
    "vipllava": Family("VipLlavaForConditionalGeneration"),
}


def family_of(config: Any) -> Family:
    """The row of a model with this configuration, by the `model_type` of its class or a base; else :data:`UNKNOWN`."""
    for cls in type(config).__mro__:
        family = FAMILIES.get(getattr(cls, "model_type", ""))
        if family is not None:
            return family
    return UNKNOWN
