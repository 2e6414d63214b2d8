"""Which tokens of a row are which image, and how they lie on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config import VISION

#: Families whose processor cuts images into views that stand side by side: which of them shows the whole image. All
#: that are not named show whole images only.
_SIDE_BY_SIDE = {"llava_next": "first", "llava_next_video": "first", "llava_onevision": "first", "internvl": "last"}
#: Families whose views are squares, each behind a token that says which it is: the row's first or last view shows a
#: whole image, and so do all others behind the same token.
_MARKED = {"ovis2": "first", "aya_vision": "last", "idefics3": "last", "smolvlm": "last"}
#: Families in which a token is a patch of the vision tower.
_PATCHES = ("llava", "llava_next", "llava_next_video", "llava_onevision", "paligemma", "video_llava", "vipllava")
#: Families whose tokens have no place on an image.
_PLACELESS = {
    "idefics2": "they are the latents of a resampler, each of which looks at all of the image",
    "mllama": "its images come in by cross-attention, and the one token among the text stands for all of an image",
}
_NOT_SAID = "neither the inputs nor the configuration say"
_BETWEEN_LINES = "the closer looks have tokens between their lines"
_PAGES_OR_TILES = "several views of GOT-OCR2 may be pages or parts of one"


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image, or of one of the closer looks that some processors add.

    Attributes:
        columns: (n,), where they stand in the row.
        grid: (frames, height, width) with n = frames x height x width; None where nothing tells how they lie.
        unknown: why not.
    """

    columns: np.ndarray
    grid: tuple[int, int, int] | None
    unknown: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {"columns": self.columns.tolist(), "grid": self.grid}


class RowImages(NamedTuple):
    """The images of a row: those tokens that show a whole image, and those of closer looks at parts of one."""

    whole: tuple[ImageTokens, ...]
    tiles: tuple[ImageTokens, ...]


def image_tokens(model: Any, inputs: Mapping[str, Any], modality: np.ndarray) -> list[RowImages]:
    """The images of every row of a batch.

    Their grids are read off what the processor made, ``image_grid_thw``, or ``image_sizes`` where a vision tower keeps
    the shape of an image; else off the configuration and the tokens between the views.

    Args:
        model: of transformers, or of the original LLaVA or Cambrian-1 code.
        inputs: of its forward.
        modality: (B, N), 1 for an image's tokens.
    """
    told, ids = _told_grids(model.config, inputs), inputs.get("input_ids")
    rows = []
    for row, kinds in enumerate(modality):
        columns = np.flatnonzero(kinds == VISION)
        images, told = _by_grid(columns, told)
        if images is not None:
            rows.append(RowImages(tuple(images), ()))
            continue
        runs = [run for run in np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1) if len(run)]
        tokens = [] if ids is None else ids[row].tolist()
        views = _marked_views(_family(model), runs, tokens)
        if views is None:
            # The original code's placeholder is negative, and one for a whole image.
            alone = sum(token < 0 for token in tokens) <= len(runs)
            views = [view for run in runs for view in _views(model, run, alone)]
        rows.append(RowImages(*(tuple(view for whole, view in views if whole == wanted) for wanted in (True, False))))
    return rows


def _told_grids(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """The grids of all images of the batch, as far as the inputs tell them."""
    vision: Any = getattr(config, "vision_config", None)
    grids, sizes = inputs.get("image_grid_thw"), inputs.get("image_sizes")
    if grids is not None:
        merge = vision.spatial_merge_size
        return [(frames, height // merge, width // merge) for frames, height, width in grids.tolist()]
    if sizes is not None and getattr(vision, "model_type", "") == "pixtral":
        cell = vision.patch_size * getattr(config, "spatial_merge_size", 1)
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


def _family(model: Any) -> str:
    return getattr(model.config, "model_type", "")


def _marked_views(family: str, runs: list[np.ndarray], tokens: list[int]) -> list[tuple[bool, ImageTokens]] | None:
    """(whole, view) for each run of a family that says before each which it is; None for any other."""
    if family not in _MARKED or not tokens or not runs:
        return None
    marks = [tokens[run[0] - 1] if run[0] else None for run in runs]
    whole = marks[0 if _MARKED[family] == "first" else -1]
    return [(mark == whole, _square(run)) for mark, run in zip(marks, runs, strict=True)]


def _views(model: Any, run: np.ndarray, alone: bool) -> Iterator[tuple[bool, ImageTokens]]:
    """(whole, view) for tokens that stand side by side: of one image if `alone`, else perhaps of several."""
    config, family = model.config, _family(model)
    if family in _PLACELESS:
        yield True, ImageTokens(run, None, _PLACELESS[family])
        return
    if hasattr(config, "image_token_len"):  # of the original Cambrian-1 code
        side = math.isqrt(config.image_token_len)
        yield True, _with_newlines(run, side) if alone else ImageTokens(run, None, _NOT_SAID)
        return
    anyres = "anyres" in getattr(config, "image_aspect_ratio", "")  # of the original LLaVA code
    order = "first" if anyres else _SIDE_BY_SIDE.get(family)
    view = next((view for view in _sizes_of_a_view(model) if view.fits(len(run), with_rest=order == "first")), None)
    if view is None:
        yield True, ImageTokens(run, None, _NOT_SAID)
    elif order == "first":
        yield True, _square(run[view.skipped : view.size])
        if len(run) > view.size:
            yield False, ImageTokens(run[view.size :], None, _BETWEEN_LINES)
    elif family == "got_ocr2" and len(run) > view.size:
        yield True, ImageTokens(run, None, _PAGES_OR_TILES)
    else:
        views = np.split(run, len(run) // view.size)
        for number, columns in enumerate(views, start=1):
            yield order != "last" or number == len(views), _square(columns[view.skipped :])


class _View(NamedTuple):
    """How many tokens a view has, and how many of its first ones are no patch."""

    size: int
    skipped: int = 0

    def fits(self, length: int, *, with_rest: bool) -> bool:
        """Whether `length` tokens are such views, or one of them and more."""
        return length % self.size == 0 or (with_rest and length > self.size)


def _sizes_of_a_view(model: Any) -> Iterator[_View]:
    """What the vision tower and the configuration say, the surest first."""
    config: Any = model.config
    vision: Any = getattr(config, "vision_config", None)
    if _family(model) in _PATCHES and isinstance(getattr(vision, "image_size", None), int):
        # A CLIP tower has a token of its own before its patches, which its features in full keep.
        in_full = getattr(config, "vision_feature_select_strategy", "") == "full"
        own = int(in_full and vision.model_type == "clip_vision_model")
        yield _View((vision.image_size // vision.patch_size) ** 2 + own, own)
    if hasattr(model, "get_vision_tower"):  # of the original LLaVA code
        yield _View(model.get_vision_tower().num_patches_per_side ** 2)
    text = getattr(config, "text_config", None)
    for part, name in ((config, "image_seq_length"), (config, "mm_tokens_per_image"), (text, "num_image_tokens")):
        if isinstance(getattr(part, name, None), int):
            yield _View(getattr(part, name))


def _square(columns: np.ndarray) -> ImageTokens:
    side = math.isqrt(len(columns))
    return ImageTokens(columns, (1, side, side)) if side**2 == len(columns) else ImageTokens(columns, None, _NOT_SAID)


def _with_newlines(run: np.ndarray, side: int) -> ImageTokens:
    """An image of Cambrian-1: a square of this side less its padding, with a token that ends every line."""
    height = len(run) // (side + 1) if len(run) % (side + 1) == 0 else side
    if len(run) % height:
        return ImageTokens(run, None, _NOT_SAID)
    lines = run.reshape(height, -1)[:, :-1]
    return ImageTokens(lines.reshape(-1), (1, *lines.shape))
