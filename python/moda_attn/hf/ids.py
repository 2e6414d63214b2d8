"""Which token is what: modality ids and context of the tokens of one forward call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import INTEGERS
from ..config import PADDING, TEXT, VIDEO, VISION
from ..errors import ModaTypeError, ModaValueError
from .memory import is_filled
from .packing import refuse_packed_rows
from .registry import MediaTokens
from .visible import key_range_of

#: Keyword arguments that a patched model's forward takes besides its own.
OWN_ARGUMENTS = ("modality_ids", "mm_token_type_ids", "moda_context")


class Entered:
    """Counts the layers that ran in one call. No bare set: FSDP with mixed precision hands every layer a copy of each
    container and dataclass among its arguments, and what the layer notes in the copy would be lost."""

    def __init__(self) -> None:
        self.layers: set[int] = set()


@dataclass
class ModaCall:
    """What every layer must know about the tokens of one forward call.

    It travels in the keyword arguments, so that checkpointed layers find it again in the backward pass.

    Attributes:
        modality: (B, n), of the n new tokens: 0 text, 1 vision, 2 video where the configuration has it, -1 padding.
        context: (B, n) bool, the tokens that may feed a basis; None for all that are no padding.
        entered: the layers that ran.
        weights: the caller wants the attention weights too (`output_attentions`).
        ranges: dense masks that were met, and their intervals.
    """

    modality: Tensor
    context: Tensor | None
    entered: Entered = field(default_factory=lambda: Entered())  # torch.compile cannot trace the bare class here
    weights: bool = False
    ranges: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def ranges_of(self, mask: Tensor, real: Tensor) -> Tensor:
        """The intervals of visible keys, (B|1, n, 2), of a 4-D mask; those of a dense one are found once a call.

        Args:
            mask: (B|1, 1, n, 2) int32, the intervals themselves, or (B|1, 1, n, K) dense.
            real: (B, K) bool, the keys that are no padding.
        """
        if mask.dtype == torch.int32:
            return mask[:, 0]
        # The mask is kept beside its intervals: its id must not pass to another one meanwhile.
        found = self.ranges.get(id(mask))
        if found is None:
            found = self.ranges[id(mask)] = (mask, key_range_of(mask, real))
        return found[1]


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
    refuse_packed_rows(arguments)
    modality = _modality(arguments, tokens)
    if context == "all":
        return ModaCall(modality, None)
    return ModaCall(modality, context_of(arguments, modality, training=training, prompt_length=prompt_length))


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
        raise ModaValueError(
            "inputs_embeds do not say which tokens are image: give modality_ids (B, N) to forward or generate"
        )
    elif tokens.image is None and not is_filled(arguments.get("past_key_values")):
        raise ModaValueError(
            "this model is of no family whose placeholders are known: give modality_ids (B, N), 0 text and 1 vision, "
            "to forward or generate, or name its placeholders in moda_attn.hf.FAMILIES"
        )
    else:
        modality = _from_placeholders(arguments, ids, tokens)
    real = _real_tokens(arguments, modality.shape[1])
    return modality if real is None else modality.masked_fill(~real.to(modality.device), PADDING)


def _explicit_modality(arguments: Mapping[str, Any], tokens: MediaTokens) -> Tensor | None:
    ids, kinds = arguments.get("modality_ids"), arguments.get("mm_token_type_ids")
    for name, given in (("modality_ids", ids), ("mm_token_type_ids", kinds)):
        if given is not None and not isinstance(given, Tensor):
            raise ModaTypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
        if given is not None and given.dtype not in INTEGERS:
            raise ModaTypeError(f"{name} has dtype {given.dtype}; wanted integers, 0 text and 1 vision")
    if ids is not None or kinds is None:
        return ids if ids is None or ids.dtype.is_signed else ids.long()  # room for the -1 of padding
    new = arguments.get("input_ids")
    if new is not None and new.shape != kinds.shape and is_filled(arguments.get("past_key_values")):
        # `generate` of some releases hands the prompt's on with every token: what is new is text.
        return torch.full_like(new, TEXT)
    return from_processor(kinds, tokens)


def from_processor(kinds: Tensor, tokens: MediaTokens) -> Tensor:
    """The modality ids that a processor's ``mm_token_type_ids`` mean, where video is 2 whatever the configuration."""
    return torch.where(kinds == VIDEO, tokens.video_modality, kinds.long())


def _from_placeholders(arguments: Mapping[str, Any], ids: Tensor, tokens: MediaTokens) -> Tensor:
    """Placeholders of features that this call brings; any other, such as a generated one, is an ordinary token."""
    modality = torch.full_like(ids, TEXT)
    videos = has_features(arguments, "video")
    # `generate` hands these on with every token.
    states = not is_filled(arguments.get("past_key_values")) and any(arguments.get(n) is not None for n in _STATES)
    if tokens.image is not None and (states or has_features(arguments, "image")):
        modality = torch.where(ids == tokens.image, VISION, modality)
    if videos and tokens.video is not None:
        modality = torch.where(ids == tokens.video, tokens.video_modality, modality)
    if videos and tokens.video_span is not None and tokens.image is not None:
        start, end = tokens.video_span
        inside = (ids == start).cumsum(-1) > (ids == end).cumsum(-1)
        modality = torch.where((ids == tokens.image) & inside, tokens.video_modality, modality)
    return modality


def refuse_late_images(arguments: Mapping[str, Any]) -> None:
    """Raise where images arrive, in a call on a cache that holds a prompt: the bases are those of the first call."""
    if has_features(arguments, "image") or has_features(arguments, "video"):
        length = past_length(arguments["past_key_values"])
        raise ModaValueError(
            f"images in a call on a cache of {int(length)} tokens: give the whole prompt in one call with an empty "
            "cache; a later turn of text needs none, its images are cached"
        )


#: Arguments that bring the features of images and of videos.
_FEATURES = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
#: Features of images that the caller has computed before, as Mllama and older releases of Idefics take them.
_STATES = ("cross_attention_states", "image_hidden_states")


def has_features(arguments: Mapping[str, Any], kind: str) -> bool:
    """Whether a call brings an "image" or a "video", as pixels or already encoded as `generate` hands them over."""
    encoded = arguments.get("mm_encoder_outputs")
    if isinstance(encoded, Mapping):
        encoded = encoded.get(kind)
    elif kind != "image":
        encoded = None
    return encoded is not None or any(arguments.get(name) is not None for name in _FEATURES[kind])


def _real_tokens(arguments: Mapping[str, Any], count: int) -> Tensor | None:
    """(B, n) bool, false on padding, for the `count` new tokens; None where the call has no mask."""
    mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
    if isinstance(mask, Mapping):
        # One mask for every kind of layer, as `generate` makes them for a static cache.
        masks = [mask.get("full_attention"), *mask.values()]
        mask = next((given for given in masks if given is not None), None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ModaValueError(f"attention_mask is {shape}; wanted (B, N), or (B, 1, Nq, Nk) as a static cache makes it")
    if mask.dim() == 2:
        return new_columns(mask, cache, count).bool()
    if mask.dtype == torch.int32:
        # Visible keys as [first, last): a token that is no padding sees at least itself.
        return (mask[..., 0] < mask[..., 1])[:, 0]
    # A token that is no padding sees itself: the diagonal that starts at the first new key.
    column = past_length(cache) + torch.arange(count, device=mask.device) - _first_key(cache)
    itself = mask[:, 0].gather(-1, column[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    return itself if itself.dtype == torch.bool else itself >= 0


def new_columns(mask: Tensor, cache: Any, count: int) -> Tensor:
    """The columns (B, n) of a mask (B, N) over all tokens, those of the cache too, that belong to the new ones.

    For a static cache the mask may be longer than what the cache holds.
    """
    start = past_length(cache)
    if isinstance(start, Tensor) and (torch.compiler.is_compiling() or start.device.type != "cpu"):
        return mask.index_select(1, start + torch.arange(count, device=start.device))
    if mask.shape[1] < int(start) + count:
        raise ModaValueError(
            f"attention_mask has {mask.shape[1]} columns for {count} new tokens after {int(start)} in the cache"
        )
    return mask[:, int(start) : int(start) + count]


def _first_key(cache: Any) -> Any:
    """Position of the first key in the masks of a cache's first layer: a sliding layer has let go of those before."""
    layer: Any = cache.layers[0] if cache is not None and cache.layers else None
    if not getattr(layer, "is_sliding", False):
        return 0
    window = getattr(layer, "max_cache_len", None) or layer.sliding_window
    return max(int(past_length(cache)) - window + 1, 0)


def past_length(cache: Any) -> int:
    """Number of tokens that a key/value cache holds; 0 for None."""
    return 0 if cache is None else cache.get_seq_length()


def context_of(
    arguments: Mapping[str, Any], modality: Tensor, *, training: bool, prompt_length: int | None
) -> Tensor | None:
    """(B, n) bool, the tokens that may feed a basis, as the arguments of :func:`describe_call` say; None for all."""
    explicit, labels = arguments.get("moda_context"), arguments.get("labels")
    if explicit is not None:
        if not isinstance(explicit, Tensor) or explicit.dtype != torch.bool or explicit.shape != modality.shape:
            raise ModaValueError(f"moda_context must be a bool tensor of shape {tuple(modality.shape)}")
        return explicit
    if isinstance(labels, Tensor) and labels.shape == modality.shape:  # labels of tokens, not of whole rows
        # The label at column 0 predicts nothing: a label is predicted by the token before it.
        supervised = labels != -100
        supervised[:, 0] = False
        return supervised.int().cumsum(-1) == 0
    if training:
        given = f"; labels of shape {tuple(labels.shape)} do not say it" if isinstance(labels, Tensor) else ""
        raise ModaValueError(
            'context = "prompt" must know where the prompt ends: give labels (B, N) or moda_context (B, N) bool to '
            f"forward{given}"
        )
    if prompt_length is not None:
        columns = torch.arange(modality.shape[1], device=modality.device)
        return (columns < prompt_length).expand(modality.shape)
    return None
