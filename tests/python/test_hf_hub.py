"""The Hugging Face Hub: a folder stands in for it, behind the real client's own signatures."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest
import torch
from torch import nn

import moda_attn
import tiny
from moda_attn.errors import ModaRuntimeError, ModaValueError

X = tiny.inputs("llava-llama", ["TTITTT", "TIT"])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**X).logits


class Hub:
    """Repositories as folders `root/owner/name`; calls that the real client would not take raise TypeError."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root = root
        self.api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
        self.api.create_repo.side_effect = self.create_repo
        self.api.upload_folder.side_effect = self.upload_folder
        self.client = mock.create_autospec(huggingface_hub.HfApi, return_value=self.api)
        download = mock.create_autospec(huggingface_hub.hf_hub_download, side_effect=self.download)
        monkeypatch.setattr(huggingface_hub, "HfApi", self.client)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    def create_repo(self, repo_id: str, **options: object) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

    def upload_folder(self, *, repo_id: str, folder_path: str, **_: object) -> SimpleNamespace:
        for path in Path(folder_path).iterdir():
            shutil.copy(path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub.invalid/{repo_id}/commit/1")

    def download(self, repo_id: str, filename: str, **_: object) -> str:
        path = self.root / repo_id / filename
        if not path.is_file():
            raise FileNotFoundError(f"no {filename}")
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(tmp_path / "hub", monkeypatch)


def trained() -> nn.Module:
    model = tiny.build()
    moda_attn.apply(model)
    tiny.randomise(model)
    return model


def test_push_and_load(hub: Hub):
    model = trained()
    address = moda_attn.push_to_hub(model, "someone/moda", private=True, token="secret", commit_message="Weights")
    assert address == "https://hub.invalid/someone/moda/commit/1"
    hub.client.assert_called_once_with(token="secret")
    hub.api.create_repo.assert_called_once_with("someone/moda", private=True, exist_ok=True)
    options = hub.api.upload_folder.call_args.kwargs
    assert (options["revision"], options["create_pr"], options["commit_message"]) == (None, False, "Weights")
    assert {path.name for path in (hub.root / "someone/moda").iterdir()} == {
        "moda_config.json",
        "moda_model.safetensors",
    }
    assert not Path(options["folder_path"]).exists()

    fresh = tiny.build()
    moda_attn.load_pretrained(fresh, "someone/moda", revision="v1", token="secret")
    assert torch.equal(logits(fresh), logits(model))
    options = huggingface_hub.hf_hub_download.call_args.kwargs
    assert options == {"revision": "v1", "token": "secret"}


def test_a_folder_comes_before_a_repository(hub: Hub):
    model = trained()
    moda_attn.save_pretrained(model, "someone/moda")
    fresh = tiny.build()
    moda_attn.load_pretrained(fresh, "someone/moda")
    assert torch.equal(logits(fresh), logits(model))
    huggingface_hub.hf_hub_download.assert_not_called()


def test_what_cannot_be_had_raises(hub: Hub):
    model = tiny.build()
    with pytest.raises(ModaRuntimeError, match=r"someone/else is no folder, and moda_config\.json could not be read"):
        moda_attn.load_pretrained(model, "someone/else")
    with pytest.raises(ModaValueError, match="not patched; nothing to save"):
        moda_attn.push_to_hub(model, "someone/else")
    hub.client.assert_not_called()
    with pytest.raises(ModaValueError, match=r"/no/such/folder holds no moda_config\.json"):
        moda_attn.load_pretrained(model, "/no/such/folder")


def test_offline_the_real_client_raises_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModaRuntimeError, match="nobody/nothing is no folder"):
        moda_attn.load_pretrained(tiny.build(), "nobody/nothing")
