"""Every method of the committed report on small fine-tunes learns."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from memplan import registry

SCRIPT = Path(__file__).parents[1] / "reports" / "make_convergence.py"

ROW = re.compile(r"^\| ([a-z-]+) \| .* \| ([-\d.]+) \|$", re.MULTILINE)


def gains(text: str) -> list[tuple[str, float]]:
    """Methods, and how far below the frozen model's their loss is."""
    return [(name, float(gain)) for name, gain in ROW.findall(text)]


def test_every_method_is_below_the_frozen_model() -> None:
    found = gains(SCRIPT.with_name("convergence.md").read_text())

    assert {name for name, _ in found} == set(registry.names("methods"))
    assert all(gain > 0 for _, gain in found), found


@pytest.mark.slow
def test_the_report_can_be_made_again() -> None:
    """Other machines round otherwise, so that losses are compared loosely."""
    made = dict(gains(runpy.run_path(str(SCRIPT))["report"]()))

    committed = dict(gains(SCRIPT.with_name("convergence.md").read_text()))
    assert made.keys() == committed.keys()
    assert all(abs(made[name] - committed[name]) < 0.15 for name in made)
