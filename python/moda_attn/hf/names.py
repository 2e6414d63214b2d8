"""Names that several files of this folder share."""

from __future__ import annotations

#: The attention implementation of this package, as transformers knows it.
NAME = "moda"
