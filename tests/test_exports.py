"""The public names of the package: sorted, complete, and resolved only when somebody asks."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import tensorkv
from tensorkv import errors, store

HOME = Path(tensorkv.__file__)


def test_all_is_sorted_and_without_doubles() -> None:
    assert tensorkv.__all__ == sorted(set(tensorkv.__all__))


def test_every_name_is_there_and_listed_by_dir() -> None:
    for name in tensorkv.__all__:
        assert getattr(tensorkv, name) is not None
    assert set(tensorkv.__all__) <= set(dir(tensorkv))


def test_all_is_complete() -> None:
    """Every name that the file imports for its users is in `__all__`, and nothing else is."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(HOME.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorkv"):
            imported.update(alias.asname or alias.name for alias in node.names)
    assert imported | {"__version__"} == set(tensorkv.__all__)


def test_every_error_is_public() -> None:
    leaves = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert leaves <= set(tensorkv.__all__)


def test_records_of_the_store_are_public() -> None:
    records = {
        name
        for name, value in vars(store).items()
        if inspect.isclass(value) and value.__module__ == store.__name__ and not name.startswith("_")
    }
    assert records <= set(tensorkv.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(tensorkv, "no_such_name")


def test_importing_the_package_imports_no_torch() -> None:
    script = (
        "import sys, tensorkv; print('torch' in sys.modules); tensorkv.KVStore; print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_public_names_have_docstrings() -> None:
    plain = {"__version__", "ABSENT"}
    without = [
        name for name in tensorkv.__all__ if name not in plain and not inspect.getdoc(getattr(tensorkv, name))
    ]
    methods = [
        name
        for name, value in vars(tensorkv.KVStore).items()
        if not name.startswith("_") and not inspect.getdoc(value)
    ]
    assert without + methods == []
