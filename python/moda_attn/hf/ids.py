"""Which token is what: modality ids and context of the tokens of one forward call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import PADDING, TEXT, VISION
from ..errors import ModaTypeError, ModaValueError

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
        modality: (B, n), of the n new tokens: 0 text, 1 vision, -1 padding.
        context: (B, n) bool, the tokens that may feed a basis; None for all that are no padding.
        entered: the layers that ran.
    """

    modality: Tensor
    context: Tensor | None
    entered: Entered = field(default_factory=Entered)


def describe_call(
    arguments: Mapping[str, Any], image_token: int, *, context: str, training: bool, prompt_length: int | None
) -> ModaCall:
    """Read the modality ids and the context off the arguments of a forward call.

    Args:
        arguments: of the model's forward, by name.
        image_token: id of the placeholder of image features.
        context: "prompt" or "all".
        training: whether the call is a training step, which must not guess where the prompt ends.
        prompt_length: number of prompt columns while the model generates.
    """
    _refuse_packed_rows(arguments)
    modality = _modality(arguments, image_token)
    if context == "all":
        return ModaCall(modality, None)
    return ModaCall(modality, _context(arguments, modality, training=training, prompt_length=prompt_length))


def _modality(arguments: Mapping[str, Any], image_token: int) -> Tensor:
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    explicit = arguments.get("modality_ids")
    if explicit is None:
        explicit = arguments.get("mm_token_type_ids")
    if explicit is not None:
        if not isinstance(explicit, Tensor):
            raise ModaTypeError(f"modality_ids must be a torch.Tensor, got {type(explicit).__name__}")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise ModaValueError("modality_ids without input_ids or inputs_embeds: there is nothing to describe")
        wanted = tokens.shape[:2]
        if explicit.shape != wanted:
            raise ModaValueError(f"modality_ids has shape {tuple(explicit.shape)}; wanted {tuple(wanted)}")
        modality = explicit
    elif ids is None:
        raise ModaValueError("inputs_embeds do not say which tokens are image: give modality_ids (B, N) to forward")
    elif _has_images(arguments):
        modality = torch.where(ids == image_token, VISION, TEXT)
    else:
        # Without features in this call the placeholder id is an ordinary token, for instance a generated one.
        modality = torch.full_like(ids, TEXT)
    real = _real_tokens(arguments, modality.shape[1])
    return modality if real is None else modality.masked_fill(~real.to(modality.device), PADDING)


def _refuse_packed_rows(arguments: Mapping[str, Any]) -> None:
    """Several samples in one row would feed each other's bases; transformers tells them by their positions too."""
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None or torch.compiler.is_compiling():
        return
    if positions.dim() != 2:  # Several axes, as in Qwen2-VL: not one count of tokens.
        return
    if past_length(arguments.get("past_key_values")) == 0 and (positions.diff(dim=-1) != 1).any():
        raise ModaValueError("position_ids do not rise by one, and no attention_mask: packed rows are not supported")


def refuse_late_images(arguments: Mapping[str, Any]) -> None:
    """Raise where images arrive, in a call on a cache that holds a prompt: the bases are those of the first call."""
    if _has_images(arguments):
        length = past_length(arguments["past_key_values"])
        raise ModaValueError(
            f"images in a call on a cache of {int(length)} tokens: give the whole prompt in one call with an empty "
            "cache; a later turn of text needs none, its images are cached"
        )


def _has_images(arguments: Mapping[str, Any]) -> bool:
    encoded = arguments.get("mm_encoder_outputs") or {}
    return arguments.get("pixel_values") is not None or encoded.get("image") is not None


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
