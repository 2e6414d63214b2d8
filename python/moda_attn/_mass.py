"""What `return_mass` of attention asks for, said in one place for every face of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .errors import ModaTypeError, ModaValueError

MassBy = Literal["none", "relation", "modality"]


def mass_by(return_mass: object, num_modalities: object, *, has_table: bool) -> MassBy:
    """How the mass is split; raises where it is by modality and nothing says how many of them there are."""
    if num_modalities is not None:
        # A symbolic int of torch.compile is an int too.
        if isinstance(num_modalities, bool) or not hasattr(num_modalities, "__index__"):
            raise ModaTypeError(f"num_modalities is a {type(num_modalities).__name__}; wanted an int")
        if num_modalities < 1:  # type: ignore[operator]
            raise ModaValueError(f"num_modalities is {num_modalities}; wanted 1 or more")
    if return_mass is False or return_mass is True:
        return "relation" if return_mass else "none"
    if return_mass != "modality":
        raise ModaValueError(f'return_mass is {return_mass!r}; wanted False, True or "modality"')
    if num_modalities is None and not has_table:
        raise ModaValueError(
            "num_modalities is None; wanted the number of modalities, or a modality_bias (B|1, Hq|1, M, M) that shows"
            ' it: return_mass="modality" has a column for each'
        )
    return "modality"


def columns(by: MassBy, num_modalities: int | None, table: Sequence[int] | None) -> int:
    """Number of columns of a mass; `table` is the shape of the modality bias. Any number does for a wrong shape."""
    if by == "relation":
        return 3
    return 1 + (sum((table or ())[-1:]) if num_modalities is None else num_modalities)
