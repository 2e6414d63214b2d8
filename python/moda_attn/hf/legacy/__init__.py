"""The original code bases of LLaVA and Cambrian-1, which run on transformers 4.37, recognised by what they offer.

Nothing of theirs is imported. What differs from newer models: keyword arguments do not reach the attention, the merged
sequence is built inside ``prepare_inputs_labels_for_multimodal``, and attention is not pluggable.

=============  =====================================================================================
``structure``  recognises a model and finds its attention modules
``tokens``     which position of the merged sequence is image, text or padding
``cache``      the key/value cache that carries ids and bases to every layer, and the seam before it
``attention``  one patched attention module
``runtime``    the hooks that tie these to a model
=============  =====================================================================================
"""

from __future__ import annotations

from .attention import legacy_patched
from .runtime import LegacyRuntime
from .structure import LegacyStructure

__all__ = ["LegacyRuntime", "LegacyStructure", "legacy_patched"]
