"""The stub of the extension says what the extension has."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import moda_attn
from moda_attn import _native

STUB = ast.parse((Path(moda_attn.__file__).parent / "_native.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


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
