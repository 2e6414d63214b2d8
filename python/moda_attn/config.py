"""What a MODA layer computes, as one frozen, validated record."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ModaValueError

#: Names of the first modality ids, in the order of transformers' `mm_token_type_ids`; others are written as their id.
MODALITIES = ("text", "vision", "video", "audio")
TEXT, VISION, VIDEO, PADDING = 0, 1, 2, -1

_CHOICES = {
    "basis": ("covariance", "gram"),
    "aligner": ("basis", "mlp", "mlp2", "mlp2_gelu"),
    "fusion": ("original", "aligned", "add", "concat", "gated"),
    "mask": ("none", "fixed", "decay", "learned"),
    "combine": ("joint", "split"),
    "context": ("prompt", "all"),
}


@dataclass(frozen=True)
class ModaConfig:
    """Configuration of duplex alignment and modular masked attention.

    The default is the paper's method with values that are safe to patch a pretrained model with.

    Attributes:
        num_modalities: M; ids run from 0 (text) and 1 (vision) to M - 1. 2 is video: with M = 2 it counts as vision.
        align: modalities whose keys are aligned, by name or id; ``()`` turns alignment off.
        basis: "covariance" or "gram", what the basis of a modality is (equation 5; table 1b).
        aligner: "basis", or the ablations of table 1b: "mlp", "mlp2", "mlp2_gelu".
        fusion: how key and mapped key are joined (table 1c); "original" turns alignment off.
        fuser_rank: makes the fuser of "concat" low-rank: ``keep = I + A1 B1``, ``mix = A2 B2``.
        mask: the pseudo-scores (table 1d): "none", "fixed" (no decay), "decay", or "learned" (a mask key).
        span: positions that the pseudo-scores fill up to; a constant of the model, its context window.
        decay: initial decay of mask "decay", the same for every head; None means the ALiBi slopes.
        base: initial level of masks "fixed" and "decay"; -4 leaves a pretrained model nearly as it was.
        combine: one softmax over all keys ("joint") or one each over own and other modalities ("split").
        location_prior: a learned bias between modalities from the likeness of their bases (section 3.3).
        context: tokens that may feed a basis: "prompt" (nothing leaks) or "all" (as released; an answer leaks).
        layers: "all", or the indices of the layers to patch.

    Raises:
        ModaValueError: a value out of range, or fields that contradict each other.
    """

    num_modalities: int = 2
    align: tuple[str | int, ...] = ("text", "vision")
    basis: str = "covariance"
    aligner: str = "basis"
    fusion: str = "concat"
    fuser_rank: int | None = None
    mask: str = "decay"
    span: int = 4096
    decay: float | None = None
    base: float = -4.0
    combine: str = "joint"
    location_prior: bool = True
    context: str = "prompt"
    layers: str | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        for name in ("align", "layers"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str | bytes):
                object.__setattr__(self, name, tuple(value))
        self._check_values()
        self._check_agreement()

    @classmethod
    def paper(cls) -> ModaConfig:
        """The literal values of the paper: the pseudo-scores start at base 0."""
        return cls(base=0.0)

    @classmethod
    def released(cls) -> ModaConfig:
        """What the released code computes: vision keys aligned through a gate, no mask, every token in the basis."""
        return cls(align=("vision",), fusion="gated", mask="none", location_prior=False, context="all")

    @property
    def align_ids(self) -> tuple[int, ...]:
        """Ids of the modalities whose keys are changed, in rising order; empty where alignment is off."""
        if self.fusion == "original":
            return ()
        return tuple(sorted(MODALITIES.index(name) if isinstance(name, str) else name for name in self.align))

    @property
    def needs_basis(self) -> bool:
        """Whether anything reads the bases of the modalities."""
        return self.location_prior or (self.aligner == "basis" and bool(self.align_ids))

    @property
    def changes_attention(self) -> bool:
        """Whether the attention itself is another than plain causal softmax attention."""
        return self.mask != "none" or self.location_prior or self.combine == "split"

    def layer_indices(self, count: int) -> tuple[int, ...]:
        """The indices of the layers to patch in a model of `count` layers."""
        if isinstance(self.layers, str):
            return tuple(range(count))
        if max(self.layers, default=-1) >= count:
            raise ModaValueError(f"layers = {self.layers}, but the model has {count} layers, 0 .. {count - 1}")
        return tuple(sorted(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; :meth:`from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModaConfig:
        """The configuration that `values` describes; fields left out keep their default.

        Raises:
            ModaValueError: a field that does not exist, or a value that is not allowed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ModaValueError(f"unknown fields {unknown}; known are {sorted(known)}")
        return cls(**values)

    def _check_values(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ModaValueError(f"{name} = {value!r}; wanted one of {', '.join(map(repr, allowed))}")
        _whole("num_modalities", self.num_modalities)
        _whole("span", self.span)
        if self.fuser_rank is not None:
            _whole("fuser_rank", self.fuser_rank)
        if self.decay is not None:
            _number("decay", self.decay)
        _number("base", self.base)
        if not isinstance(self.location_prior, bool):
            raise ModaValueError(f"location_prior = {self.location_prior!r}; wanted True or False")
        if not isinstance(self.align, tuple) or not all(map(self._is_modality, self.align)):
            named = ", ".join(map(repr, MODALITIES[: self.num_modalities]))
            raise ModaValueError(
                f"align = {self.align!r}; wanted a tuple of {named} or ids below {self.num_modalities}"
            )
        ids = [MODALITIES.index(entry) if isinstance(entry, str) else entry for entry in self.align]
        if len(set(ids)) != len(ids):
            raise ModaValueError(f"align = {self.align!r} names a modality twice")
        if self.layers != "all" and not _are_indices(self.layers):
            raise ModaValueError(f'layers = {self.layers!r}; wanted "all" or distinct indices, 0 or more, at least one')

    def _is_modality(self, entry: object) -> bool:
        if isinstance(entry, str):
            return entry in MODALITIES[: self.num_modalities]
        return isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < self.num_modalities

    def _check_agreement(self) -> None:
        if self.num_modalities == 1 and (self.align_ids or self.location_prior):
            raise ModaValueError("num_modalities = 1 has no other modality: set align = () and location_prior = False")
        if self.fuser_rank is not None and (self.fusion != "concat" or not self.align):
            raise ModaValueError(f'fuser_rank = {self.fuser_rank} needs fusion = "concat" and a modality to align')
        if self.decay is not None and self.mask != "decay":
            raise ModaValueError(f'decay = {self.decay} has no use with mask = {self.mask!r}; it belongs to "decay"')
        if self.base != type(self).base and self.mask not in ("fixed", "decay"):
            raise ModaValueError(
                f'base = {self.base} has no use with mask = {self.mask!r}; it belongs to "fixed" or "decay"'
            )
        if self.aligner != "basis" and not self.align_ids:
            raise ModaValueError(
                f"aligner = {self.aligner!r} has nothing to align: fusion {self.fusion!r}, align {self.align!r}"
            )


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModaValueError(f"{name} = {value!r}; wanted a whole number, 1 or more")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ModaValueError(f"{name} = {value!r}; wanted a finite number")


def _are_indices(layers: object) -> bool:
    return (
        isinstance(layers, tuple)
        and bool(layers)
        and all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in layers)
        and len(set(layers)) == len(layers)
    )
