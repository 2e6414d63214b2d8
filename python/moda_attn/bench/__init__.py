"""``moda-attn bench``: the full operator against what stock PyTorch offers, side by side in one process."""

from .run import main

__all__ = ["main"]
