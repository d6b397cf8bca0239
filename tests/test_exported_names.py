from __future__ import annotations

import ast
from pathlib import Path

import pytest

import memplan


def test_names_are_sorted_and_there() -> None:
    assert memplan.__all__ == sorted(memplan.__all__)
    for name in memplan.__all__:
        assert getattr(memplan, name).__name__ == name


def test_names_that_load_late_are_those_that_types_see() -> None:
    tree = ast.parse(Path(memplan.__file__).read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("memplan.")
        for alias in node.names
    }

    assert sorted(seen) == memplan.__all__
    assert {
        name: f"memplan.{module}" for name, module in memplan._MODULES.items()
    } == seen


def test_dir_tells_the_names() -> None:
    assert set(memplan.__all__) <= set(dir(memplan))


def test_other_names_are_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        memplan.nothing  # noqa: B018 - looking it up is what is tested


def test_star_import_brings_the_names() -> None:
    names: dict[str, object] = {}

    exec("from memplan import *", names)

    assert set(memplan.__all__) <= names.keys()
