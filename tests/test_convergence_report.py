"""Every method of the committed report on small fine-tunes learns."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from memplan import registry

SCRIPT = Path(__file__).parents[1] / "reports" / "make_convergence.py"

ROW = re.compile(r"^\| ([a-z-]+) \| .* ± ([\d.]+) \| ([-\d.]+) \|$", re.MULTILINE)


def gains(text: str) -> list[tuple[str, float, float]]:
    """Methods, half the spread of their losses, and how far below the frozen model."""
    return [(name, float(half), float(gain)) for name, half, gain in ROW.findall(text)]


def test_every_method_is_below_the_frozen_model() -> None:
    found = gains(SCRIPT.with_name("convergence.md").read_text())

    names = registry.names("methods")
    assert {name for name, _, _ in found} == set(names)
    # On both bases, but for full fine-tuning, which has no quantised one.
    assert len(found) == 2 * len(names) - 1
    assert all(gain > 2 * half for _, half, gain in found), found


@pytest.mark.slow
def test_the_report_can_be_made_again() -> None:
    """Other machines round otherwise, so that losses are compared loosely."""
    made = gains(runpy.run_path(str(SCRIPT))["report"]())

    committed = gains(SCRIPT.with_name("convergence.md").read_text())
    assert [name for name, _, _ in made] == [name for name, _, _ in committed]
    for (_, _, one), (_, _, other) in zip(made, committed, strict=True):
        assert abs(one - other) < 0.15
