"""What the vision towers of the tiny models are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Number of images in each row, a generator for each row -> arguments of forward.
Pixels = Callable[[list[int], list[torch.Generator]], dict[str, Tensor]]


def _noise(counts: list[int], generators: list[torch.Generator], *shape: int) -> list[Tensor]:
    """(count, ...) of each row."""
    return [torch.randn(count, *shape, generator=each) for count, each in zip(counts, generators, strict=True)]


def flat(*shape: int, name: str = "pixel_values") -> Pixels:
    """One entry for every image of the batch."""
    return lambda counts, generators: {name: torch.cat(_noise(counts, generators, *shape))}


def by_row(*shape: int) -> Pixels:
    """(B, most images of a row, ...), zeros where a row has fewer."""
    return lambda counts, generators: {
        "pixel_values": nn.utils.rnn.pad_sequence(_noise(counts, generators, *shape), batch_first=True)
    }


def sized(pixels: Pixels, size: tuple[int, int] = (8, 8)) -> Pixels:
    """With the sizes of the images beside the pixels."""
    return lambda counts, generators: {
        **pixels(counts, generators),
        "image_sizes": torch.tensor([size] * sum(counts)),
    }


def grid(prefix: str, frames: int, patch_values: int) -> Pixels:
    """Patches in one long row, and their grid: Qwen's and GLM's way. 4 x 4 patches, merged by 2 x 2."""
    name = "pixel_values" if prefix == "image" else "pixel_values_videos"
    return lambda counts, generators: {
        name: torch.cat(_noise(counts, generators, frames * 16, patch_values)).flatten(0, 1),
        f"{prefix}_grid_thw": torch.tensor([[frames, 4, 4]] * sum(counts)),
    }


def tiled(counts: list[int], generators: list[torch.Generator]) -> dict[str, Tensor]:
    """Mllama's: every image is two tiles, of which the first is real. Aspect ratio 1 is one tile; 0 is no image."""
    result = by_row(2, 3, 8, 8)(counts, generators)
    there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    tiles = torch.stack([there, torch.zeros_like(there)], dim=-1)
    return {**result, "aspect_ratio_ids": there.long(), "aspect_ratio_mask": tiles.long()}
