"""What the extension says about itself, and that its stub says what it has."""

from __future__ import annotations

import ast
import inspect
import os
from pathlib import Path

import pytest

import moda_attn
from moda_attn import _native

STUB = ast.parse((Path(moda_attn.__file__).parent / "_native.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def test_build_info():
    info = moda_attn.build_info()
    assert info["version"] == moda_attn.__version__
    assert info["compiler"].startswith("rustc 1.")
    assert "python" in info["features"]
    assert info["devices"] == (["cpu", "cuda"] if "cuda" in info["features"] else ["cpu"])
    assert info["isa"] in info["isa_available"]
    assert info["isa_available"][0] == "scalar"
    assert 1 <= info["processors"] <= (os.cpu_count() or 1)


def test_explain_names_what_runs_and_why():
    info, text = moda_attn.build_info(), moda_attn.explain()
    assert f"{info['isa']}: {info['isa_reason']}" in text
    assert "cpu" in text


def test_the_names_are_the_same():
    public = {name for name in dir(_native) if not name.startswith("__")}
    assert public == set(FUNCTIONS) | set(CLASSES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_parameters_are_the_same(name: str):
    real = list(inspect.signature(getattr(_native, name)).parameters)
    assert [argument.arg for argument in FUNCTIONS[name].args.args] == real


def test_the_members_of_the_tensor_are_the_same():
    declared = {node.name for node in CLASSES["Tensor"].body if isinstance(node, ast.FunctionDef)}
    added = {name for name in vars(_native.Tensor) if name not in vars(object)}
    assert added - {"__module__"} == declared
