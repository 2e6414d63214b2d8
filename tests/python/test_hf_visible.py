"""The interval of keys that every query sees, against the dense masks of transformers."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as masks

from moda_attn.errors import ModaValueError
from moda_attn.hf import visible
from moda_attn.hf.visible import Keys, key_range, window_of

LENGTH = 23
PADDING = torch.ones(2, LENGTH, dtype=torch.bool)
PADDING[0, :5] = False
PADDING[1, 20:] = False
BLOCKS = torch.full((2, LENGTH), -1)
BLOCKS[0, 7:11], BLOCKS[0, 14:18], BLOCKS[1, 2:9] = 0, 1, 0
POSITIONS = torch.cat([torch.arange(9), torch.arange(8), torch.arange(6)])[None].expand(2, -1)
SEQUENCES = (POSITIONS == 0).long().cumsum(-1)


def blocks(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Image blocks that see both ways."""
    return (BLOCKS[row, query] == BLOCKS[row, key]) & (BLOCKS[row, query] >= 0)


def chunks(size: int) -> Callable:
    """Chunked attention; the function takes other arguments in other releases."""
    if "left_padding" in inspect.signature(masks.chunked_causal_mask_function).parameters:
        return masks.chunked_causal_mask_function(size, torch.tensor([5, 0]))
    return masks.chunked_causal_mask_function(size)


PATTERNS = {
    "causal": masks.causal_mask_function,
    "window": masks.sliding_window_causal_mask_function(4),
    "everything": lambda batch, head, query, key: query >= 0,
    "chunks": chunks(4),
    "blocks": masks.or_masks(masks.causal_mask_function, blocks),
    "blocks beside a window": masks.or_masks(masks.sliding_window_causal_mask_function(3), blocks),
    "blocks in a window": masks.and_masks(
        masks.sliding_window_overlay(6), masks.or_masks(masks.causal_mask_function, blocks)
    ),
    "packed": masks.and_masks(masks.packed_sequence_mask_function(SEQUENCES), masks.causal_mask_function),
    "packed windows": masks.and_masks(
        masks.packed_sequence_mask_function(SEQUENCES), masks.sliding_window_causal_mask_function(3)
    ),
}


@functools.cache
def dense(pattern: str) -> Tensor:
    """(2, N, N), one pair at a time, as the functions are defined."""
    places = [torch.tensor(place) for place in range(LENGTH)]
    result = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
    for row, query, key in itertools.product(places[:2], places, places):
        result[row, query, key] = PATTERNS[pattern](row, places[0], query, key)
    return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("first", "offset"), [(0, 0), (22, 0), (19, 8)], ids=["prefill", "decode", "sliding cache"])
def test_intervals_are_the_dense_mask(
    pattern: str, first: int, offset: int, padded: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(visible, "_CHUNK", 100)  # a few queries at a time
    queries, keys = torch.arange(first, LENGTH), Keys(LENGTH - offset, offset)
    expected = dense(pattern)[:, first:, offset:]
    columns = torch.arange(keys.length)
    for use_vmap in (True, False):
        ranges = key_range(PATTERNS[pattern], queries, keys, PADDING if padded else None, batch=2, use_vmap=use_vmap)
        assert ranges.dtype == torch.int32
        seen = ((columns >= ranges[..., :1]) & (columns < ranges[..., 1:])).expand(expected.shape)
        if padded:
            # The kernel hides padding by itself; an interval may hold some.
            seen, wanted = seen & PADDING[:, None, offset:], expected & PADDING[:, None, offset:]
            wanted = wanted & PADDING[:, first:, None]
            assert torch.equal(ranges[..., 0] < ranges[..., 1], PADDING[:, first:])
        assert torch.equal(seen, wanted if padded else expected)


def test_a_static_cache_hands_over_more_keys_than_the_mask_knows():
    keys = Keys(40, 0)
    for pattern in ("causal", "blocks in a window"):
        whole = key_range(PATTERNS[pattern], torch.arange(LENGTH), Keys(LENGTH, 0), PADDING, batch=2)
        more = key_range(
            PATTERNS[pattern] if pattern == "causal" else grown(), torch.arange(LENGTH), keys, PADDING, batch=2
        )
        assert torch.equal(whole, more)


def grown() -> Callable:
    """ "blocks in a window" with ids for 40 keys, as transformers pads them."""
    longer = torch.nn.functional.pad(BLOCKS, (0, 17), value=-1)

    def both_ways(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (longer[row, query] == longer[row, key]) & (longer[row, query] >= 0)

    return masks.and_masks(masks.sliding_window_overlay(6), masks.or_masks(masks.causal_mask_function, both_ways))


def test_what_is_known_without_looking():
    assert window_of(masks.causal_mask_function) > 10**9
    assert window_of(masks.sliding_window_causal_mask_function(7)) == 7
    assert {window_of(PATTERNS[name]) for name in list(PATTERNS)[2:]} == {None}


def test_a_pattern_that_is_no_interval():
    def first_and_last(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key == 0) | ((key <= query) & (key > query - 3))

    queries, keys = torch.arange(9), Keys(9, 0)
    with pytest.raises(ModaValueError, match="the query at 4 of row 0 sees keys before and after one"):
        key_range(first_and_last, queries, keys, None, batch=1)
    # Where only padding lies between, the interval is right.
    padding = torch.tensor([[1, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    assert key_range(first_and_last, torch.arange(7), Keys(7, 0), padding, batch=1)[0, 6].tolist() == [0, 7]
    with pytest.raises(ModaValueError, match="the query at 7"):
        key_range(first_and_last, torch.arange(8), Keys(8, 0), padding, batch=1)
