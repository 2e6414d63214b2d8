"""Saving and loading the MODA part of a patched model: a configuration and weights keyed by layer index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import __version__
from ..config import ModaConfig
from ..errors import ModaValueError
from .patch import ApplyReport, apply, moda_layers, runtime_of

CONFIG_FILE = "moda_config.json"
WEIGHTS_FILE = "moda_model.safetensors"
FORMAT = 1


def save_pretrained(model: nn.Module, path: str | Path) -> None:
    """Write ``moda_config.json`` and ``moda_model.safetensors`` into the folder `path`.

    The base model is not written; its own ``save_pretrained`` does that. Weights are keyed by layer index, not by the
    names of transformers, which change between releases.

    Raises:
        ModaValueError: the model is not patched.
    """
    runtime = runtime_of(model)
    if runtime is None or runtime.config is None:
        raise ModaValueError(f"{type(model).__name__} is not patched; nothing to save")
    weights = {name: tensor.detach().contiguous() for name, tensor in _weights(model).items()}
    if any(tensor.is_meta for tensor in weights.values()):
        raise ModaValueError("the weights are offloaded; bring them back before saving")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT,
        "version": __version__,
        "model": type(model).__name__,
        "config": runtime.config.to_dict(),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_pretrained(model: nn.Module, path: str | Path) -> ApplyReport:
    """Patch `model` as the folder `path` says, if it is not already, and load the weights.

    Raises:
        ModaValueError: files missing or of another format, a configuration other than the model's own, or weights
            that do not fit.
    """
    folder = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModaValueError(f"{folder} holds no {name}")
    record: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    if record.get("format") != FORMAT:
        raise ModaValueError(f"{CONFIG_FILE} has format {record.get('format')!r}; this version reads {FORMAT}")
    stored = load_file(folder / WEIGHTS_FILE)
    report = apply(model, ModaConfig.from_dict(record["config"]))
    own = _weights(model)
    problems = [f"missing {name}" for name in sorted(own.keys() - stored.keys())]
    problems += [f"unknown {name}" for name in sorted(stored.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, wanted {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if problems:
        raise ModaValueError(f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(problems)}")
    for name, tensor in own.items():
        tensor.data.copy_(stored[name])
    return report


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"layers.{index}.{name}": parameter
        for index, layer in moda_layers(model).items()
        for name, parameter in layer.named_parameters()
    }
