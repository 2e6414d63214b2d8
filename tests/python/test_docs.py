"""The pages for users: every Python snippet runs, every link leads somewhere, no option and no error is left out."""

from __future__ import annotations

import dataclasses
import re
import socket
import sys
from pathlib import Path

import pytest

import legacy_models
import moda_attn
from moda_attn import config, errors, hf

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if path.is_file())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def script(page: Path) -> str:
    """The page's Python, each line where it stands on the page, so that a traceback points into it."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for fence in FENCE.finditer(text):
        if fence[1] == "python":
            first = text.count("\n", 0, fence.start(2))
            block = fence[2].splitlines()
            lines[first : first + len(block)] = block
    return "\n".join(lines)


SCRIPTS = {page.relative_to(ROOT).as_posix(): script(page) for page in PAGES}
WITH_PYTHON = [name for name, code in SCRIPTS.items() if code.strip()]


def test_pages_with_snippets_were_found():
    names = ("method", "patching", "models", "fine-tune", "save-and-resume", "cambrian", "balance", "errors", "module")
    assert {f"docs/{name}.md" for name in names} <= set(WITH_PYTHON)


def refuse_network(_: socket.socket, address: object) -> None:
    raise AssertionError(f"the page connects to {address}")


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_snippets_of_a_page_run_as_one_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # The models are made from their configuration: a page that would download one fails here.
    monkeypatch.setattr(socket.socket, "connect", refuse_network)
    # What the page adds to the registry ends with it.
    monkeypatch.setitem(hf.FAMILIES, "cohere2_vision", None)
    if name == "docs/cambrian.md":
        for path, module in legacy_models.fake_cambrian().items():
            monkeypatch.setitem(sys.modules, path, module)
    exec(compile(SCRIPTS[name], str(ROOT / name), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", SCRIPTS)
def test_links_lead_somewhere(name: str):
    page = ROOT / name
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, target


def test_every_option_of_the_method_is_explained():
    text = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("method", "patching"))
    for field in dataclasses.fields(moda_attn.ModaConfig):
        assert re.search(rf"`{field.name}\b|ModaConfig\({field.name}=", text), field.name
    for name, choices in config._CHOICES.items():
        for choice in choices:
            assert f'"{choice}"' in text, f"{name}={choice!r}"


def test_every_error_is_explained_with_its_class():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for error in moda_attn.list_errors():
        assert f"| `{error['name']}` | `{error['exception']}` |" in text
    for name in errors.__all__:
        assert f"`{name}`" in text or f"`moda_attn.errors.{name}`" in text
