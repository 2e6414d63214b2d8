"""Saving and loading the MODA part of a patched model: a configuration and weights keyed by layer index."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import __version__
from ..config import ModaConfig
from ..errors import ModaRuntimeError, ModaValueError
from . import placement
from .patch import ApplyReport, apply, moda_layers, remove, runtime_of

CONFIG_FILE = "moda_config.json"
WEIGHTS_FILE = "moda_model.safetensors"
FORMAT = 1

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def save_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``moda_config.json`` and ``moda_model.safetensors`` into the folder `path`, made if it is missing.

    The base model is not written; its own ``save_pretrained`` does that. Weights are keyed by layer index, not by the
    names of transformers, which change between releases, and keep their dtype. Offloaded weights are fetched, sharded
    ones gathered: with FSDP every rank must call this, and the first one writes. Of a model in PEFT's hands the active
    adapter's copy is saved.

    Raises:
        ModaValueError: the model is not patched.
    """
    model = _base_model(model)
    weights = _read(model, None)
    if not _is_sharded(model) or torch.distributed.get_rank() == 0:
        _write_folder(model, Path(path), weights)


def load_pretrained(
    model: nn.Module, path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> ApplyReport:
    """Patch `model` as the folder `path` says, if it is not already, and load the weights into its own dtype.

    Args:
        model: with its pretrained weights loaded.
        path: a folder that :func:`save_pretrained` wrote; or, where there is no such folder, ``"owner/name"`` of a
            repository on the Hugging Face Hub.
        revision: branch, tag or commit of the repository.
        token: of the Hub, for a private repository.

    Returns:
        What :func:`~moda_attn.apply` did.

    Raises:
        ModaValueError: files missing or of another format, a configuration other than the model's own, or weights
            that do not fit; the message says what differs, and the model is as it was before.
        ModaRuntimeError: the repository could not be read.
    """
    config_file, weights_file = _find_files(path, revision, token)
    try:
        record: dict[str, Any] = json.loads(config_file.read_text())
        form = record.get("format")
    except (ValueError, AttributeError) as error:
        raise ModaValueError(f"{config_file} is not what save_pretrained writes: {error}") from error
    if form != FORMAT:
        raise ModaValueError(f"{CONFIG_FILE} has format {form!r}; this version reads {FORMAT}")
    stored = load_file(weights_file)
    report = apply(model, ModaConfig.from_dict(record["config"]))
    try:
        _load(model, stored, record.get("shape"), str(path))
    except BaseException:
        if not report.already:
            remove(model)
        raise
    return report


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add MODA weights",
    token: str | None = None,
) -> str:
    """Upload what :func:`save_pretrained` writes to a repository of the Hugging Face Hub; other files there stay.

    Args:
        model: a patched model.
        repo_id: ``"owner/name"``; the repository is made if it does not exist.
        private: whether a new repository is private; None leaves that to the owner's settings.
        revision: branch to commit to; None is the main one.
        create_pr: whether to open a pull request in place of a commit.
        commit_message: of the commit.
        token: of the Hub; None uses the one of ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        ModaValueError: the model is not patched. Errors of the Hub come through as they are.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def save_beside(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """``model.save_pretrained`` while the model is patched: the base model as ever, and our two files beside it.

    So a checkpoint of the Trainer, or of whatever saves models this way, has the MODA part in the form that
    :func:`load_pretrained` reads. A `state_dict` that was given is the one that is saved of both.
    """
    weights = _read(model, state_dict)
    if is_main_process:
        _write_folder(model, Path(save_directory), weights)
    base: Any = type(model)
    return base.save_pretrained(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)


def _base_model(model: nn.Module) -> nn.Module:
    """The patched model itself, out of the hands of PEFT."""
    if runtime_of(model) is None and hasattr(model, "peft_config"):
        model = model.get_base_model()  # type: ignore[operator]
    if runtime_of(model) is None:
        raise ModaValueError(f"{type(model).__name__} is not patched; nothing to save")
    return model


def _is_sharded(model: nn.Module) -> bool:
    return any(placement.is_sharded(p) for layer in moda_layers(model).values() for p in layer.parameters())


def _read(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights by layer index; out of `state_dict`, where one is given, by the model's own names."""
    layers = {index: placement.trained_copy(layer) for index, layer in moda_layers(model).items()}
    if state_dict is None:
        return {f"layers.{i}.{name}": t for i, layer in layers.items() for name, t in placement.read(layer).items()}
    prefixes = {id(module): prefix for prefix, module in model.named_modules()}
    weights = {}
    for index, layer in layers.items():
        for name, _ in layer.named_parameters():
            full = f"{prefixes[id(layer)]}.{name}"
            if full not in state_dict:
                raise ModaValueError(f"the state_dict to save has no {full}: it is not that of the patched model")
            weights[f"layers.{index}.{name}"] = state_dict[full].detach().cpu().contiguous()
    return weights


def _write_folder(model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
    """Both files; each is complete or not there at all."""
    runtime = runtime_of(model)
    if runtime is None or runtime.config is None:
        raise ModaValueError(f"{type(model).__name__} is not patched; nothing to save")
    record = {
        "format": FORMAT,
        "version": __version__,
        "model": type(model).__name__,
        "shape": _shape(model),
        "config": runtime.config.to_dict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".moda-") as scratch:
        save_file(weights, Path(scratch, WEIGHTS_FILE), metadata={"format": "pt"})
        Path(scratch, CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(scratch, name), folder / name)


def _shape(model: nn.Module) -> dict[str, Any]:
    """What a model must have in common with the one that the weights are from."""
    runtime = runtime_of(model)
    report = apply(model, None if runtime is None else runtime.config)
    layers = [placement.trained_copy(layer) for layer in moda_layers(model).values()]
    return {
        "layers": len(report.layers) + len(report.skipped),
        "num_heads": _agreed(layer.num_heads for layer in layers),
        "num_kv_heads": _agreed(layer.num_kv_heads for layer in layers),
        "head_dim": _agreed(layer.head_dim for layer in layers),
    }


def _agreed(sizes: Iterable[int]) -> int | list[int]:
    """One number where all layers agree."""
    listed = list(sizes)
    return listed[0] if len(set(listed)) == 1 else listed


def _find_files(path: str | os.PathLike[str], revision: str | None, token: str | None) -> tuple[Path, Path]:
    folder = Path(path)
    if not folder.is_dir() and _REPOSITORY.fullmatch(os.fspath(path)):
        return _download(os.fspath(path), revision, token)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            hint = "; it is an adapter of PEFT: apply as it was trained, then PeftModel.from_pretrained"
            is_adapter = (folder / "adapter_config.json").is_file()
            raise ModaValueError(f"{folder} holds no {name}{hint if is_adapter else ''}")
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE


def _download(repo_id: str, revision: str | None, token: str | None) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download

    def get(name: str) -> Path:
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision, token=token))
        except (OSError, ValueError) as error:  # what the Hub's own errors derive from
            raise ModaRuntimeError(
                f"{repo_id} is no folder, and {name} could not be read from the Hub: {error}"
            ) from error

    return get(CONFIG_FILE), get(WEIGHTS_FILE)


def _load(model: nn.Module, stored: Mapping[str, Tensor], shape: Mapping[str, Any] | None, source: str) -> None:
    if shape is not None and shape != (own := _shape(model)):
        differences = [
            f"{name} {shape.get(name)}, the model has {own[name]}" for name in own if shape.get(name) != own[name]
        ]
        raise ModaValueError(f"the weights in {source} do not fit {type(model).__name__}: {'; '.join(differences)}")
    load_weights(model, stored, source)


def load_weights(model: nn.Module, stored: Mapping[str, Tensor], source: str) -> None:
    """Load weights keyed by layer index into a patched model.

    Raises:
        ModaValueError: names missing or unknown, or shapes that differ: all of them are listed, and nothing is loaded.
    """
    layers = moda_layers(model)
    own = {f"layers.{i}.{name}": p.shape for i, layer in layers.items() for name, p in layer.named_parameters()}
    problems = [f"missing {name}" for name in sorted(own.keys() - stored.keys())]
    problems += [f"unknown {name}" for name in sorted(stored.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, wanted {tuple(shape)}"
        for name, shape in own.items()
        if name in stored and stored[name].shape != shape
    ]
    if problems:
        raise ModaValueError(f"the weights in {source} do not fit {type(model).__name__}: {'; '.join(problems)}")
    for index, layer in layers.items():
        placement.write(layer, {name: stored[f"layers.{index}.{name}"] for name, _ in layer.named_parameters()})
