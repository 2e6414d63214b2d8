"""Which position of a merged sequence is image: found by tagging the labels that the original code merges along."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...config import PADDING, TEXT, VISION
from ...errors import ModaRuntimeError, ModaValueError
from .structure import PREPARE, PREPARED

#: The label that a loss skips, in every code base of this kind.
IGNORED = -100

_MASK, _EMBEDS, _LABELS = (PREPARED.index(name) for name in ("attention_mask", "inputs_embeds", "labels"))


@dataclass(frozen=True)
class Prepared:
    """What is known about the tokens that the original method returned.

    Attributes:
        tokens: that very tensor, the merged embeddings (B, N, E), or the ids (B, N) where nothing was merged.
        modality: (B, N): 0 text, 1 vision, -1 padding; None where every real token is text.
        labels: (B, N) as the model gets them, None without.
    """

    tokens: weakref.ref[Tensor]
    modality: Tensor | None
    labels: Tensor | None

    def describes(self, tokens: Tensor) -> bool:
        """Whether this is about `tokens`."""
        return self.tokens() is tokens

    def expanded(self, batch: int, length: int) -> Prepared:
        """The same for a batch in which `generate` repeats every row for its beams.

        Raises:
            ModaValueError: `batch` and `length` are not those of such a batch.
        """
        if self.modality is None:
            return self
        rows, columns = self.modality.shape
        if length != columns or batch % rows:
            raise ModaValueError(
                f"generate runs on ({batch}, {length}) embeddings; {PREPARE} made ({rows}, {columns}) of them"
            )
        return Prepared(self.tokens, self.modality.repeat_interleave(batch // rows, dim=0), None)


def prepare(original: Callable[..., tuple], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, Prepared]:
    """Call the original method and find out which position of its result is what.

    The method gives image positions the label -100. With a tag in place of the user's own -100, only image positions
    and padding come back as -100, and the mask tells those two apart.

    Args:
        original: ``prepare_inputs_labels_for_multimodal`` of the model.
        args, kwargs: of the call.

    Returns:
        Exactly what the original returns for these arguments, and the description of the tokens in it.
    """
    bound = inspect.signature(original).bind(*args, **kwargs)
    arguments = bound.arguments
    ids, labels, mask = (arguments.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor):
        raise ModaValueError(f"{PREPARE} needs input_ids, a tensor (B, N); got {type(ids).__name__}")
    tag = torch.iinfo((ids if labels is None else labels).dtype).min
    tagged = torch.full_like(ids, tag) if labels is None else labels.masked_fill(labels == IGNORED, tag)
    # Without a mask the method would not say which rows it had to pad.
    full = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    bound.arguments.update(labels=tagged, attention_mask=full)
    result = list(original(*bound.args, **bound.kwargs))
    embeds, merged, real = result[_EMBEDS], result[_LABELS], result[_MASK]
    if embeds is None:
        result[_LABELS] = labels
        result[_MASK] = mask if real is full else real
        return tuple(result), Prepared(weakref.ref(result[0]), None, labels)
    if merged is tagged or real is None:
        raise ModaRuntimeError(
            f"{PREPARE} returned images without merging the labels (as Cambrian does on a TPU): which positions are "
            "image cannot be told"
        )
    real = real.bool()
    modality = torch.where((merged == IGNORED) & real, VISION, TEXT).masked_fill(~real, PADDING)
    result[_LABELS] = None if labels is None else merged.masked_fill(merged == tag, IGNORED)
    if mask is None:
        result[_MASK] = None
    return tuple(result), Prepared(weakref.ref(embeds), modality, result[_LABELS])
