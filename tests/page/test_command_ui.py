"""`memplan ui` where its packages are missing."""

from __future__ import annotations

import sys

import pytest
from command_line import run


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    ran = run("ui")

    assert (ran.code, ran.out) == (2, "")
    assert "pip install 'memplan[ui]'" in ran.err
