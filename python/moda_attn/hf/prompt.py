"""What `generate` is told about its prompt: only the prompt may feed a basis, whatever the first call holds besides."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TEXT
from ..errors import ModaTypeError, ModaValueError


@dataclass(frozen=True)
class Prompt:
    """The prompt of a running `generate`.

    Attributes:
        length: P, its number of columns; None where `generate` was given no tensor.
        modality_ids: (B, P), where the caller says what each token is.
        context: (B, P) bool, the tokens that may feed a basis, where the caller says so.
    """

    length: int | None
    modality_ids: Tensor | None = None
    context: Tensor | None = None

    @classmethod
    def take(cls, args: tuple, kwargs: dict[str, Any]) -> Prompt:
        """Read the prompt off the arguments of `generate`; takes out of `kwargs` what `generate` does not know."""
        given = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
        prompt = next((tensor for tensor in (*args[:1], *given) if tensor is not None), None)
        length = prompt.shape[1] if isinstance(prompt, Tensor) else None
        own = {name: kwargs.pop(name, None) for name in ("modality_ids", "moda_context")}
        for name, tensor in own.items():
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise ModaTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if not isinstance(prompt, Tensor) or tensor.shape != prompt.shape[:2]:
                wanted = tuple(prompt.shape[:2]) if isinstance(prompt, Tensor) else "the shape of input_ids"
                raise ModaValueError(f"{name} has shape {tuple(tensor.shape)}; wanted {wanted}, as the prompt")
        return cls(length, own["modality_ids"], own["moda_context"])

    def describe(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The caller's words about the prompt as arguments of a forward call that holds all of it.

        Rows are repeated as `generate` repeats them for beams and samples; columns after the prompt, drafts or tokens
        generated without a cache, are text and feed no basis.
        """
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return {}
        words = {"modality_ids": (self.modality_ids, TEXT), "moda_context": (self.context, False)}
        result = {}
        for name, (tensor, later) in words.items():
            if tensor is None or arguments.get(name) is not None:
                continue
            rows, columns = tokens.shape[:2]
            if columns < tensor.shape[1] or rows % tensor.shape[0]:
                raise ModaValueError(
                    f"{name} describes a prompt of shape {tuple(tensor.shape)}, but generate runs the model on tokens "
                    f"of shape {(rows, columns)}, as it does for guidance_scale: what those are is unknown"
                )
            tensor = tensor.to(tokens.device).repeat_interleave(rows // tensor.shape[0], dim=0)
            rest = tensor.new_full((rows, columns - tensor.shape[1]), later)
            result[name] = torch.cat([tensor, rest], dim=1)
        kinds = arguments.get("mm_token_type_ids")
        if isinstance(kinds, Tensor) and kinds.shape[1] == self.length:
            # A processor's words, which `generate` hands on without the columns of drafts.
            result["mm_token_type_ids"] = F.pad(kinds, (0, tokens.shape[1] - kinds.shape[1]), value=TEXT)
        return result


class PerThread(threading.local):
    """What belongs to the calling thread alone: several may generate on one model at the same time.

    A copy of a model runs nothing yet, so that a copy of this holds nothing.
    """

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()

    @property
    def prompt(self) -> Prompt | None:
        """Of the `generate` that runs in this thread; None outside of one."""
        return getattr(self, "_prompt", None)

    @contextmanager
    def generating(self, prompt: Prompt) -> Iterator[None]:
        """Have `prompt` be the running one inside the block."""
        outer = self.prompt
        self._prompt: Prompt | None = prompt
        try:
            yield
        finally:
            self._prompt = outer
