"""The package as a whole: what importing costs, and that every public name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moda_attn


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = (
        "import sys, moda_attn; dir(moda_attn); moda_attn.__version__; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_configuration_needs_no_torch():
    code = "import sys, moda_attn; moda_attn.ModaConfig.paper(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", moda_attn.__all__)
def test_every_public_name_exists(name: str):
    assert getattr(moda_attn, name) is not None
    assert name in dir(moda_attn)


def test_a_missing_library_is_named_with_what_brings_it():
    code = (
        "import sys, moda_attn\n"
        "for library, name in (('torch', 'functional'), ('torch', 'apply'), ('numpy', 'numpy')):\n"
        "    sys.modules[library] = None\n"
        "    try: getattr(moda_attn, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f'moda_attn.{name} needs {library}, which is not installed: pip install {library} or "moda-attn[{library}]"'
        for library, name in (("torch", "functional"), ("torch", "apply"), ("numpy", "numpy"))
    ]


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moda_attn.nothing  # noqa: B018


def test_one_version():
    cargo = Path(__file__).parents[2] / "Cargo.toml"
    assert re.search(r'^version = "(.+)"', cargo.read_text(), re.MULTILINE).group(1) == moda_attn.__version__
