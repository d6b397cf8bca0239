from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memplan import registry
from memplan.errors import UnknownNameError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of parts in a package of memplan's, made for a test."""
    import memplan

    package = tmp_path / "made_parts"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "plain.py").write_text("PART = 'the plain part'")
    (package / "two_words.py").write_text("PART = 'the other part'")
    (package / "_shared.py").write_text("raise ImportError")
    monkeypatch.setattr(memplan, "__path__", [*memplan.__path__, str(tmp_path)])
    yield "made_parts"
    registry.names.cache_clear()
    for name in [name for name in sys.modules if "made_parts" in name]:
        del sys.modules[name]


def test_part_is_named_after_its_file(folder: str) -> None:
    assert registry.names(folder) == ("plain", "two-words")
    assert registry.load(folder, "two-words", "field") == "the other part"


def test_names_import_no_part(folder: str) -> None:
    registry.names(folder)

    assert "memplan.made_parts.plain" not in sys.modules


@pytest.mark.parametrize("name", ["two_words", "_shared", "", "plain.x", "../plain"])
def test_unknown_part_is_refused_by_name(folder: str, name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"field: .* is unknown"):
        registry.load(folder, name, "field")
