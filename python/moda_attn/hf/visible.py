"""Which keys a query may see, as one interval a query, derived from the mask functions of transformers.

transformers describes a mask by a function of (batch, head, query, key), put together from causality, windows, chunks,
packed sequences and blocks that see both ways. Our kernel takes an interval [first, last) of keys for every query, O(N)
numbers. All of those patterns are such intervals; one that is not raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModaValueError

#: Elements of the dense mask that are looked at together, for patterns that must be looked at.
_CHUNK = 1 << 22


class Keys(NamedTuple):
    """The keys that attention is given: `length` of them from position `offset` on."""

    length: int
    offset: int


def key_range(
    mask_function: Callable,
    queries: Tensor,
    keys: Keys,
    padding_mask: Tensor | None,
    *,
    batch: int,
    use_vmap: bool = True,
) -> Tensor:
    """The interval [first, last) of visible keys for every query.

    Args:
        mask_function: of transformers, without padding.
        queries: (n,) positions of the queries, counted as columns of `padding_mask`.
        keys: the keys, counted from 0 in the result.
        padding_mask: (B, N) bool, true for real tokens; columns that are missing at its end are false.
        batch: B.
        use_vmap: whether `mask_function` takes single indices only.

    Returns:
        (B|1, n, 2) int32; [0, 0) for a query that is padding, and for no other.

    Raises:
        ModaValueError: a query sees real keys before and after a real key that it does not see.
    """
    real = None if padding_mask is None else _columns(padding_mask, keys.offset, keys.length, queries.device)
    window = window_of(mask_function)
    if window is None:
        ranges = _looked_at(mask_function, queries, keys, real, batch, use_vmap)
    else:
        last = queries + 1 - keys.offset
        ranges = torch.stack([(last - window).clamp(min=0), last], dim=-1)[None]
    if padding_mask is not None:
        padding = ~_columns(padding_mask, queries[0], len(queries), queries.device)
        ranges = ranges.masked_fill(padding[..., None], 0)
    return ranges.to(torch.int32)


def window_of(mask_function: Callable) -> int | None:
    """Number of keys that a plain causal function sees at most, without looking at it: a window's, 2^31 - 1 for all;
    None for every other function."""
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

    if mask_function is causal_mask_function:
        return torch.iinfo(torch.int32).max
    if torch.compiler.is_compiling() or getattr(mask_function, "__code__", None) is not and_masks().__code__:
        return None
    overlay, *others = sorted(_closure(mask_function)["mask_functions"], key=lambda part: part is causal_mask_function)
    if others != [causal_mask_function] or overlay.__code__ is not sliding_window_overlay(1).__code__:
        return None
    return _closure(overlay)["sliding_window"]


def _closure(function: Callable) -> dict[str, Any]:
    """What a nested function holds from around it."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _columns(mask: Tensor, start: int | Tensor, count: int, device: torch.device) -> Tensor:
    """`count` columns of a mask (B, N) from `start` on; false where there are none."""
    columns = start + torch.arange(count, device=device)
    mask = mask.to(device)
    inside = columns < mask.shape[1]
    return mask[:, columns.clamp(max=mask.shape[1] - 1)].bool() & inside


def key_range_of(mask: Tensor, real: Tensor) -> Tensor:
    """The intervals of a dense mask, as some models make it themselves.

    Args:
        mask: (B|1, 1, n, K), bool and true where visible, or floating: 0 where visible, very negative elsewhere.
        real: (B, K) bool, the keys that are no padding.

    Returns:
        (B, n, 2) int32.

    Raises:
        ModaValueError: heads with masks of their own, other values, or a query that sees no interval.
    """
    if mask.shape[1] != 1:
        raise ModaValueError(f"an attention mask {tuple(mask.shape)} for every head cannot be expressed; wanted one")
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    if mask.dtype != torch.bool and ((mask[:, 0] > -1e4) & ~visible).any():
        raise ModaValueError("an attention mask that adds to scores cannot be expressed; wanted 0 or very negative")
    queries = torch.arange(visible.shape[1], device=mask.device)
    rows = max(_CHUNK // max(real.numel(), 1), 1)
    before = torch.nn.functional.pad(real.long().cumsum(-1), (1, 0))
    parts = zip(visible.split(rows, dim=1), queries.split(rows), strict=True)
    return torch.cat([_intervals(part & real[:, None], before, some) for part, some in parts], dim=1).to(torch.int32)


def _looked_at(
    mask_function: Callable, queries: Tensor, keys: Keys, real: Tensor | None, batch: int, use_vmap: bool
) -> Tensor:
    """The intervals (B, n, 2) of any function: it is evaluated, some queries at a time."""
    columns = torch.arange(keys.length, device=queries.device) + keys.offset
    rows = max(_CHUNK // max(batch * keys.length, 1), 1)
    before = None if real is None else torch.nn.functional.pad(real.long().cumsum(-1), (1, 0))
    chunks = []
    for chunk in queries.split(rows):
        visible = _evaluate(mask_function, chunk, columns, batch, use_vmap)
        chunks.append(_intervals(visible if real is None else visible & real[:, None], before, chunk))
    return torch.cat(chunks, dim=1)


def _intervals(visible: Tensor, before: Tensor | None, queries: Tensor) -> Tensor:
    """First and one past the last visible key, (B, n, 2), of (B, n, K) without padding; `before` (B, K + 1) counts the
    real keys before each, None where all are real. Raises where a real key between them is hidden."""
    seen = visible.sum(-1)
    first = visible.to(torch.uint8).argmax(-1)
    last = torch.where(seen > 0, visible.shape[-1] - visible.flip(-1).to(torch.uint8).argmax(-1), 0)
    inside = last - first if before is None else before.gather(1, last) - before.gather(1, first)
    _refuse_gaps((inside != seen) & (seen > 0), queries)
    return torch.stack([first, last], dim=-1)


def _evaluate(function: Callable, queries: Tensor, keys: Tensor, batch: int, use_vmap: bool) -> Tensor:
    """The mask of one head, (B, n, K) bool."""
    rows = torch.arange(batch, device=queries.device)
    head = torch.zeros((), dtype=torch.long, device=queries.device)
    if use_vmap:
        # vmap takes no index by a single-element tensor without this.
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        for over in ((None, None, None, 0), (None, None, 0, None), (0, None, None, None)):
            function = torch.vmap(function, in_dims=over)
        with TransformGetItemToIndex():
            return function(rows, head, queries, keys)
    visible = function(rows[:, None, None], head, queries[None, :, None], keys[None, None, :])
    return visible.expand(batch, len(queries), len(keys))


def _refuse_gaps(gaps: Tensor, queries: Tensor) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(~gaps.any(), "an attention pattern is no interval of keys, which cannot be expressed")
    elif gaps.any():
        row, query = gaps.nonzero()[0].tolist()
        raise ModaValueError(
            f"the attention pattern cannot be expressed: the query at {int(queries[query])} of row {row} sees keys "
            "before and after one that it does not see; wanted one interval of keys for every query, as in windows, "
            "chunks, packed rows and blocks"
        )
