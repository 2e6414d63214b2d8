"""Which tokens of a row are which image, and how they lie on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import VISION

#: Families whose image is an overview first, then closer looks with tokens between their lines.
_OVERVIEW_FIRST = ("llava_next", "llava_next_video", "llava_onevision")


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image, or of one view of it where the processor cuts images into views.

    Attributes:
        columns: (n,), where they stand in the row.
        grid: (frames, height, width) with n = frames x height x width; None where nothing tells how they lie.
    """

    columns: np.ndarray
    grid: tuple[int, int, int] | None


def image_tokens(config: Any, inputs: Mapping[str, Any], modality: np.ndarray) -> tuple[tuple[ImageTokens, ...], ...]:
    """The images of every row of a batch.

    Their grids are read off what the processor made: ``image_grid_thw``, or ``image_sizes`` where a vision tower keeps
    the shape of an image; else off the configuration, where every view has the same square of tokens.

    Args:
        config: of the model.
        inputs: of its forward.
        modality: (B, N), 1 for an image's tokens.
    """
    told = _told_grids(config, inputs)
    rows = []
    for ids in modality:
        columns = np.flatnonzero(ids == VISION)
        images, told = _by_grid(columns, told)
        if images is None:
            runs = np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)
            images = [view for run in runs if len(run) for view in _views(config, run)]
        rows.append(tuple(images))
    return tuple(rows)


def _told_grids(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """The grids of all images of the batch, as far as the inputs tell them."""
    vision: Any = getattr(config, "vision_config", None)
    grids = inputs.get("image_grid_thw")
    if grids is not None:
        merge = vision.spatial_merge_size
        return [(frames, height // merge, width // merge) for frames, height, width in grids.tolist()]
    sizes = inputs.get("image_sizes")
    if sizes is not None and hasattr(config, "spatial_merge_size"):
        cell = vision.patch_size * config.spatial_merge_size
        return [(1, height // cell, width // cell) for height, width in np.asarray(sizes).tolist()]
    return []


def _by_grid(
    columns: np.ndarray, told: list[tuple[int, int, int]]
) -> tuple[list[ImageTokens] | None, list[tuple[int, int, int]]]:
    """The images that fill `columns` exactly, and the grids left for the rows below; None where they do not."""
    images: list[ImageTokens] = []
    start = 0
    for number, grid in enumerate(told):
        if start == len(columns):
            return images, told[number:]
        images.append(ImageTokens(columns[start : start + math.prod(grid)], grid))
        start += math.prod(grid)
    return (images, []) if told and start == len(columns) else (None, told)


def _views(config: Any, run: np.ndarray) -> list[ImageTokens]:
    """The views of one image whose tokens stand side by side."""
    count = _tokens_of_a_view(config)
    side = math.isqrt(count)
    if side == 0 or side * side != count or len(run) < count:
        return [ImageTokens(run, None)]
    grid = (1, side, side)
    if len(run) % count == 0:
        return [ImageTokens(view, grid) for view in np.split(run, len(run) // count)]
    if getattr(config, "model_type", "") in _OVERVIEW_FIRST:
        return [ImageTokens(run[:count], grid), ImageTokens(run[count:], None)]
    return [ImageTokens(run, None)]


def _tokens_of_a_view(config: Any) -> int:
    """As the configuration says it; 0 where it does not."""
    for name in ("image_seq_length", "mm_tokens_per_image"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return getattr(getattr(config, "text_config", None), "num_image_tokens", None) or 0
