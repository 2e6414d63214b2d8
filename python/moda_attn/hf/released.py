"""Loading weights of the authors' released code, which has names and layouts of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from ..config import ModaConfig
from ..errors import ModaTypeError, ModaValueError
from .patch import ApplyReport, apply, moda_layers, remove, runtime_of
from .placement import write

#: Of one attention module: the gate r (1, 1, D) and the fuser W (D, D), which it uses as ``y = W x``.
GATE, FUSER = "ratio_v", "pfuser_v.weight"
#: Made by the released code, stored, and never read by its forward: the text side, and a norm.
UNUSED = ("ratio_t", "pfuser_t.weight", "pnorm.weight")

_OURS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(.+)$")
_THEIRS = re.compile(r"(?:^|\.)(?:ratio_|pfuser|pnorm)")


def load_released(model: nn.Module, state_dict: Mapping[str, Tensor]) -> ApplyReport:
    """Load the MODA part of a checkpoint of the authors' released code (``k' = W (k + r * mapped k)`` on vision keys).

    `model` is patched with ``ModaConfig.released()``, unless it is patched already: then its alignment must be the
    released one, while the rest of its configuration, such as ``context="prompt"``, is free. Per text layer ``i`` the
    names ``...layers.i.self_attn.ratio_v`` and ``...layers.i.self_attn.pfuser_v.weight`` are read under any prefix;
    ``ratio_t``, ``pfuser_t.weight`` and ``pnorm.weight``, which the released forward never uses, are left out. Names
    that are not MODA's belong to the base model and are not touched: load that first.

    Args:
        model: the base model, of a supported family, with its weights loaded.
        state_dict: tensors by the released names, of any floating dtype.

    Returns:
        What :func:`~moda_attn.apply` did.

    Raises:
        ModaTypeError: `state_dict` is no mapping of tensors.
        ModaValueError: names missing or unknown, or shapes that do not fit; all are listed, and the model is as it was
            before. Or a model patched with another alignment.
    """
    if not isinstance(state_dict, Mapping):
        raise ModaTypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    found, unknown = _sort(state_dict)
    runtime = runtime_of(model)
    config = ModaConfig.released() if runtime is None or runtime.config is None else runtime.config
    _refuse_other_alignment(config)
    report = apply(model, config)
    try:
        fusers = _translate(model, found, unknown)
    except BaseException:
        if not report.already:
            remove(model)
        raise
    for index, layer in moda_layers(model).items():
        write(cast(nn.Module, layer.aligner.fuser), fusers[index])
    return report


def _sort(state_dict: Mapping[str, Tensor]) -> tuple[dict[int, dict[str, Tensor]], list[str]]:
    """The tensors to load by layer and name, and names that look like MODA's and are not known."""
    found: dict[int, dict[str, Tensor]] = {}
    unknown = []
    for full, tensor in state_dict.items():
        if not _THEIRS.search(full):
            continue
        match = _OURS.search(full)
        if match is None or match[2] not in (GATE, FUSER, *UNUSED):
            unknown.append(full)
        elif not isinstance(tensor, Tensor):
            raise ModaTypeError(f"{full} must be a torch.Tensor, got {type(tensor).__name__}")
        elif match[2] not in UNUSED:
            names = found.setdefault(int(match[1]), {})
            if match[2] in names:
                raise ModaValueError(f"{full} is the second tensor for layer {match[1]}: give one checkpoint")
            names[match[2]] = tensor
    return found, unknown


def _translate(
    model: nn.Module, found: dict[int, dict[str, Tensor]], unknown: list[str]
) -> dict[int, dict[str, Tensor]]:
    """The parameters of each layer's :class:`~moda_attn.aligner.GatedFuser`, which multiplies rows by W transposed.

    Raises:
        ModaValueError: whatever does not fit, all of it.
    """
    layers = moda_layers(model)
    problems = [f"unknown {name}" for name in sorted(unknown)]
    problems += [f"unexpected layer {index}" for index in sorted(found.keys() - layers.keys())]
    for index, layer in layers.items():
        dim = layer.head_dim
        names = found.setdefault(index, {})
        for name, wanted in ((GATE, (1, 1, dim)), (FUSER, (dim, dim))):
            if name not in names:
                problems.append(f"missing layers.{index}.self_attn.{name}")
            elif tuple(names[name].shape) != wanted:
                problems.append(f"layers.{index}.self_attn.{name} is {tuple(names[name].shape)}, wanted {wanted}")
    if problems:
        raise ModaValueError(f"the released weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    return {index: {"gate": found[index][GATE][0], "weight": found[index][FUSER].T[None]} for index in layers}


def _refuse_other_alignment(config: ModaConfig) -> None:
    released = ModaConfig.released()
    for name in ("align_ids", "basis", "aligner", "fusion"):
        if getattr(config, name) != getattr(released, name):
            raise ModaValueError(
                f"the model is patched with {name} = {getattr(config, name)!r}; the released alignment has "
                f"{getattr(released, name)!r}: call moda_attn.remove first"
            )
