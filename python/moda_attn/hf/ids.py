"""Which token is what: modality ids and context of the tokens of one forward call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import PADDING, TEXT, VIDEO, VISION
from ..errors import ModaTypeError, ModaValueError
from .registry import MediaTokens

#: Keyword arguments that a patched model's forward takes besides its own.
OWN_ARGUMENTS = ("modality_ids", "mm_token_type_ids", "moda_context")


@dataclass
class ModaCall:
    """What every layer must know about the tokens of one forward call.

    It travels in the keyword arguments, so that checkpointed layers find it again in the backward pass.

    Attributes:
        modality: (B, n), of the n new tokens: 0 text, 1 vision, 2 video where the configuration has it, -1 padding.
        context: (B, n) bool, the tokens that may feed a basis; None for all that are no padding.
        entered: indices of the layers that ran.
        aligned: indices of those that handed their keys to the seam.
    """

    modality: Tensor
    context: Tensor | None
    entered: set[int] = field(default_factory=set)
    aligned: set[int] = field(default_factory=set)


def describe_call(
    arguments: Mapping[str, Any],
    tokens: MediaTokens,
    *,
    context: str,
    training: bool,
    prompt_length: int | None,
) -> ModaCall:
    """Read the modality ids and the context off the arguments of a forward call.

    Args:
        arguments: of the model's forward, by name.
        tokens: the placeholders of image and video features.
        context: "prompt" or "all".
        training: whether the call is a training step, which must not guess where the prompt ends.
        prompt_length: number of prompt columns while the model generates.
    """
    _refuse_packed_rows(arguments)
    modality = _modality(arguments, tokens)
    if context == "all":
        return ModaCall(modality, None)
    return ModaCall(modality, _context(arguments, modality, training=training, prompt_length=prompt_length))


def _modality(arguments: Mapping[str, Any], tokens: MediaTokens) -> Tensor:
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    explicit = _explicit_modality(arguments, tokens)
    if explicit is not None:
        new = ids if ids is not None else embeds
        if new is None:
            raise ModaValueError("modality_ids without input_ids or inputs_embeds: there is nothing to describe")
        wanted = new.shape[:2]
        if explicit.shape != wanted:
            raise ModaValueError(f"modality_ids has shape {tuple(explicit.shape)}; wanted {tuple(wanted)}")
        modality = explicit
    elif ids is None:
        raise ModaValueError("inputs_embeds do not say which tokens are image: give modality_ids (B, N) to forward")
    elif tokens.image is None and not past_length(arguments.get("past_key_values")):
        raise ModaValueError(
            "this model is of no family whose placeholders are known: give modality_ids (B, N), 0 text and 1 vision, "
            "to forward or generate"
        )
    else:
        modality = _from_placeholders(arguments, ids, tokens)
    real = _real_tokens(arguments, modality.shape[1])
    return modality if real is None else modality.masked_fill(~real.to(modality.device), PADDING)


def _explicit_modality(arguments: Mapping[str, Any], tokens: MediaTokens) -> Tensor | None:
    for name in ("modality_ids", "mm_token_type_ids"):
        given = arguments.get(name)
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise ModaTypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
        # Processors number videos 2 whatever the configuration makes of them.
        return given if name == "modality_ids" else torch.where(given == VIDEO, tokens.video_modality, given)
    return None


def _from_placeholders(arguments: Mapping[str, Any], ids: Tensor, tokens: MediaTokens) -> Tensor:
    """Placeholders of features that this call brings; any other, such as a generated one, is an ordinary token."""
    modality = torch.full_like(ids, TEXT)
    images, videos = has_features(arguments, "image"), has_features(arguments, "video")
    if images:
        modality = torch.where(ids == tokens.image, VISION, modality)
    if videos and tokens.video is not None:
        modality = torch.where(ids == tokens.video, tokens.video_modality, modality)
    if videos and tokens.video_span is not None:
        start, end = tokens.video_span
        inside = (ids == start).cumsum(-1) > (ids == end).cumsum(-1)
        modality = torch.where((ids == tokens.image) & inside, tokens.video_modality, modality)
    return modality


def _refuse_packed_rows(arguments: Mapping[str, Any]) -> None:
    """Several samples in one row would feed each other's bases; transformers tells them by their positions too."""
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None or torch.compiler.is_compiling():
        return
    if positions.dim() == 3:
        # Of several dimensions; the first of four is the place in the row, which three do not tell.
        positions = positions[0] if positions.shape[0] == 4 else positions[:0]
    if past_length(arguments.get("past_key_values")) == 0 and (positions.diff(dim=-1) != 1).any():
        raise ModaValueError("position_ids do not rise by one, and no attention_mask: packed rows are not supported")


def refuse_late_images(arguments: Mapping[str, Any]) -> None:
    """Raise where images arrive on a cache that holds a prompt: the bases are those of the first call."""
    length = past_length(arguments.get("past_key_values"))
    media = has_features(arguments, "image") or has_features(arguments, "video")
    if media and isinstance(length, int) and length:
        raise ModaValueError(
            f"images in a call on a cache of {length} tokens: give the whole prompt in one call with an empty cache"
        )


#: Arguments that bring the features of images and of videos.
_FEATURES = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


def has_features(arguments: Mapping[str, Any], kind: str) -> bool:
    """Whether a call brings an "image" or a "video", as pixels or already encoded as `generate` hands them over."""
    encoded = arguments.get("mm_encoder_outputs")
    if isinstance(encoded, Mapping):
        encoded = encoded.get(kind)
    elif kind != "image":
        encoded = None
    return encoded is not None or any(arguments.get(name) is not None for name in _FEATURES[kind])


def _real_tokens(arguments: Mapping[str, Any], count: int) -> Tensor | None:
    """(B, n) bool, false on padding, for the last `count` tokens; None where the call has no mask."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Mapping):
        # One mask for each kind of layer; only that of full attention still shows all of the padding.
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ModaValueError(f"attention_mask is {shape}; wanted (B, N), or (B, 1, Nq, Nk) as a static cache makes it")
    if mask.dim() == 2:
        if mask.shape[1] < count:
            raise ModaValueError(f"attention_mask has {mask.shape[1]} columns for {count} new tokens")
        return mask[:, -count:].bool()
    # The last query row of a causal mask sees every real token.
    start = int(past_length(arguments.get("past_key_values")))
    row = mask[:, 0, -1, start : start + count]
    return row if row.dtype == torch.bool else row >= 0


def past_length(cache: Any) -> int:
    """Number of tokens that a key/value cache holds; 0 for None."""
    return 0 if cache is None else cache.get_seq_length()


def _context(
    arguments: Mapping[str, Any], modality: Tensor, *, training: bool, prompt_length: int | None
) -> Tensor | None:
    explicit, labels = arguments.get("moda_context"), arguments.get("labels")
    if explicit is not None:
        if not isinstance(explicit, Tensor) or explicit.dtype != torch.bool or explicit.shape != modality.shape:
            raise ModaValueError(f"moda_context must be a bool tensor of shape {tuple(modality.shape)}")
        return explicit
    if labels is not None:
        # The label at column 0 predicts nothing: a label is predicted by the token before it.
        supervised = labels != -100
        supervised[:, 0] = False
        return supervised.int().cumsum(-1) == 0
    if training:
        raise ModaValueError(
            'context = "prompt" must know where the prompt ends: give labels or moda_context (B, N) bool to forward'
        )
    if prompt_length is not None:
        columns = torch.arange(modality.shape[1], device=modality.device)
        return (columns < prompt_length).expand(modality.shape)
    return None
