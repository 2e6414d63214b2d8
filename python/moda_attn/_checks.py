"""Checks of tensor arguments shared by the pure torch code; every message says what was given and what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ModaTypeError, ModaValueError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of `dtype` is computed with: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(**named: object) -> None:
    """Raise unless every argument is a tensor and all of them live on one device."""
    first: tuple[str, Tensor] | None = None
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ModaTypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if first is None:
            first = (name, value)
        elif value.device != first[1].device:
            raise ModaValueError(
                f"{name} is on {value.device}, {first[0]} is on {first[1].device}; give both on one device"
            )


def floating(**named: Tensor) -> torch.dtype:
    """Raise unless all arguments share one supported floating dtype; returns it."""
    wanted = next(iter(named.values())).dtype
    given = ", ".join(f"{name} {value.dtype}" for name, value in named.items())
    if wanted not in FLOATS:
        raise ModaTypeError(f"unsupported dtype: {given}; wanted float64, float32, bfloat16 or float16")
    if any(value.dtype != wanted for value in named.values()):
        raise ModaTypeError(f"dtypes must agree: {given}")
    return wanted


def dtype_in(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise unless `value` has one of the allowed dtypes."""
    if value.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise ModaTypeError(f"{name} has dtype {value.dtype}; wanted {names}")


def shape(name: str, value: Tensor, wanted: tuple[int | str | tuple[int, ...], ...], meaning: str) -> None:
    """Raise unless `value` has the wanted shape. An entry is a size, a tuple of sizes, or a str that any size meets."""

    def fits(size: int, entry: int | str | tuple[int, ...]) -> bool:
        return isinstance(entry, str) or (size in entry if isinstance(entry, tuple) else size == entry)

    if value.dim() == len(wanted) and all(map(fits, value.shape, wanted)):
        return
    sizes = ", ".join("|".join(map(str, entry)) if isinstance(entry, tuple) else str(entry) for entry in wanted)
    raise ModaValueError(f"{name} has shape {tuple(value.shape)}; wanted {meaning} = ({sizes})")


def modality_ids(name: str, ids: Tensor, num_modalities: int | None) -> None:
    """Raise at the first id below -1 or, when `num_modalities` is given, at or above it."""
    dtype_in(name, ids, INTEGERS)
    bad = ids < -1
    if num_modalities is not None:
        bad = bad | (ids >= num_modalities)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        wanted = "-1 (padding) or more" if num_modalities is None else f"-1 (padding) .. {num_modalities - 1}"
        raise ModaValueError(f"{name}[{row}, {column}] = {int(ids[row, column])}; wanted {wanted}")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the allowed names."""
    if value not in allowed:
        raise ModaValueError(f"{name} = {value!r}; wanted one of {', '.join(map(repr, allowed))}")
