"""The attention that every token receives: a heat map over the image, without an attention map."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import compute_dtype
from ..config import TEXT
from ..errors import ModaRuntimeError, ModaValueError
from ..hf.record import AttentionCall
from ..hf.wrappers import unwrapped
from .chance import chance_received
from .grid import ImageTokens, image_tokens
from .measure import combine_of, forward, is_patched, seen_by, selections, unmeasured
from .report import modality_name, plain
from .statistics import Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReceivedAttention:
    """The attention mass that every token receives, layer by layer.

    Attributes:
        layers: indices of the measured layers, in order.
        modality: (B, N) of the tokens, -1 for padding.
        mass: (modality, answer rows alone) of the query rows -> (L, B, N): mean over these rows of the same batch row,
            and over heads. NaN in a batch row that has no such query rows. Over the tokens of a row it adds up to 1,
            less the pseudo-scores' share (to 2 at most with ``combine="split"``).
        chance: the same at even attention of these rows to every key that they see.
        images: for each batch row the tokens that show a whole image, an entry an image.
        tiles: for each batch row those of closer looks at parts of its images, which some processors add.
        patched: whether the model was patched.
        unmeasured: index of every other layer -> why it is not measured, such as cross-attention.
    """

    layers: tuple[int, ...]
    modality: np.ndarray
    mass: dict[Kind, np.ndarray]
    chance: dict[Kind, np.ndarray]
    images: tuple[tuple[ImageTokens, ...], ...]
    tiles: tuple[tuple[ImageTokens, ...], ...]
    patched: bool
    unmeasured: dict[int, str] = field(default_factory=dict)

    def of(self, modality: int = TEXT, *, answers_only: bool = False) -> np.ndarray:
        """(L, B, N): what the query rows of `modality` give; raises ``KeyError`` where there are none."""
        return self._from(self.mass, modality, answers_only)

    def chance_of(self, modality: int = TEXT, *, answers_only: bool = False) -> np.ndarray:
        """(L, B, N): what they would give at even attention."""
        return self._from(self.chance, modality, answers_only)

    def _from(self, given: dict[Kind, np.ndarray], modality: int, answers_only: bool) -> np.ndarray:
        if (modality, answers_only) not in given:
            raise KeyError(f"no {'answer ' if answers_only else ''}query rows of {modality_name(modality)}")
        return given[modality, answers_only]

    def heat_map(
        self,
        row: int = 0,
        image: int | ImageTokens = 0,
        *,
        modality: int = TEXT,
        answers_only: bool = False,
        grid: tuple[int, int, int] | None = None,
    ) -> np.ndarray:
        """(L, frames x height, width): what one image of one batch row receives from the query rows of `modality`.

        Args:
            row, image: which; an entry of `tiles` too. modality, answers_only: from whom.
            grid: (frames, height, width) where the image does not know its own.

        Raises:
            ModaValueError: nothing tells how the tokens of that image lie on it, or a grid of another size.
            IndexError: there is no such row or image.
        """
        tokens = self.images[row][image] if isinstance(image, int) else image
        grid = tokens.grid if grid is None else grid
        if grid is None or math.prod(grid) != len(tokens.columns):
            raise ModaValueError(
                f"{f'image {image}' if isinstance(image, int) else 'the tile'} of row {row} has {len(tokens.columns)}"
                f" tokens, and how they lie is {f'not known: {tokens.unknown}' if grid is None else grid};"
                " give grid = (frames, height, width) with as many"
            )
        frames, height, width = grid
        received = self.of(modality, answers_only=answers_only)[:, row, tokens.columns]
        return received.reshape(len(self.layers), frames * height, width)

    def share_at_chance(
        self, row: int = 0, image: int = 0, *, modality: int = TEXT, answers_only: bool = False
    ) -> float:
        """The share of the attention of these query rows that would lie on an image if it were even, mean over layers.

        Args:
            row, image, modality, answers_only: as for `heat_map`.
        """
        received = self.chance_of(modality, answers_only=answers_only)[:, row, self.images[row][image].columns]
        return float(received.sum(axis=-1).mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; None stands for NaN."""
        return {
            "patched": self.patched,
            "layers": list(self.layers),
            "unmeasured": self.unmeasured,
            "modality": self.modality.tolist(),
            "images": [[image.to_dict() for image in row] for row in self.images],
            "tiles": [[tile.to_dict() for tile in row] for row in self.tiles],
            "mass": [
                {
                    "modality": modality,
                    "answers_only": answers,
                    "received": plain(received),
                    "chance": plain(self.chance[modality, answers]),
                }
                for (modality, answers), received in self.mass.items()
            ],
        }

    def plot(self, picture: Any = None, *, row: int = 0, image: int = 0, style: str = "light", **of: Any) -> Figure:
        """Heat maps over an image, drawn over ``picture`` where it is given; ``of`` as in `heat_map`."""
        from .plot import image as draw

        return draw(self.heat_map(row, image, **of), picture, layers=self.layers, style=style)


def received_attention(model: nn.Module, **inputs: Any) -> ReceivedAttention:
    """The attention that every token receives from the query rows of each modality, and from the answer rows alone.

    One forward pass in evaluation mode, in memory linear in the sequence length. Key j receives ``sum_i w_i p_ij`` from
    rows weighted w: the gradient of attention with respect to value j, where the output's gradient is w in one column.
    So the kernel's backward pass, which recomputes p from the logarithm of the row sums, gives it, for as many choices
    of w at once as the heads have dimensions.

    Args:
        model: a supported Hugging Face model, patched or not; left as it was found.
        **inputs: what its ``forward`` takes; ``labels`` mark the answer rows, those that predict a supervised token.
    """
    recorder = forward(model, ReceivedRecorder(inputs.get("labels")), inputs)
    layers = tuple(sorted(recorder.received))
    mass, chance = (
        dict(zip(recorder.selections, np.stack([found[layer] for layer in layers], axis=1), strict=True))
        for found in (recorder.received, recorder.chance)
    )
    assert recorder.modality is not None
    modality = recorder.modality.cpu().numpy()
    images, tiles = zip(*image_tokens(unwrapped(model), inputs, modality), strict=True)
    return ReceivedAttention(
        layers,
        modality,
        mass,
        chance,
        images,
        tiles,
        is_patched(model),
        unmeasured(model),
    )


class ReceivedRecorder:
    """Collects for each layer what every key receives from each selection of query rows, measured and at chance, each
    (S, B, K).

    Args:
        labels: (B, N), where the model is given them merged already.
    """

    def __init__(self, labels: Tensor | None):
        self.labels = labels
        self.modality: Tensor | None = None
        self.selections: dict[Kind, Tensor] = {}
        self.received: dict[int, np.ndarray] = {}
        self.chance: dict[int, np.ndarray] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Called by the attention function."""
        if call.index in self.received:
            raise ModaRuntimeError("a layer was called twice in one forward pass; use_cache and chunking must be off")
        if self.modality is None:
            self.modality = call.queries.modality
            self.selections = selections(call.queries.modality, self.labels)
        rows = torch.stack(list(self.selections.values())).to(call.query.device)
        output, received = attend_and_receive(call, rows)
        self.received[call.index] = received.double().cpu().numpy()
        self.chance[call.index] = chance_received(
            call.state.modality.cpu().numpy(), *seen_by(call), rows.cpu().numpy(), combine=combine_of(call)
        )
        return output


def attend_and_receive(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, Hq, n, D) of `call`, and what every key receives from each selection of query rows.

    Args:
        call: of one layer.
        rows: (S, B, n) bool, at most D selections of query rows.

    Returns:
        The output, and (S, B, K): the mean over the selected rows and over heads of the mass on each key; NaN where
        nothing is selected.
    """
    selected, heads, dtype = len(rows), call.query.shape[1], call.query.dtype
    if selected > call.query.shape[-1]:
        raise ModaValueError(
            f"{selected} selections of query rows; wanted at most {call.query.shape[-1]}, the head dim"
        )
    # Gradients of a bfloat16 value would be bfloat16 too: three digits.
    wide = call.in_dtype(compute_dtype(dtype))
    weights = rows.to(wide.query.dtype)
    weights = weights / weights.sum(-1, keepdim=True) / heads
    with torch.enable_grad():
        value = wide.value.detach().requires_grad_()
        output, _ = wide.attend(value=value)
        gradient = torch.zeros_like(output)
        # A row of zeros in place of NaN: it would spoil the gradient of the other selections.
        gradient[..., :selected] = weights.nan_to_num().permute(1, 2, 0)[:, None]
        (received,) = torch.autograd.grad(output, value, gradient)
    received = received[..., :selected].sum(1).permute(2, 0, 1)
    return output.detach().to(dtype), received.masked_fill(~rows.any(-1)[..., None], torch.nan)
