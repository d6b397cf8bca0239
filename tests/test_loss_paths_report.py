"""The committed report on ways to the loss is what its script writes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "reports" / "make_loss_paths.py"


@pytest.mark.slow
def test_report_is_up_to_date() -> None:
    pytest.importorskip("trl")
    report = runpy.run_path(str(SCRIPT))["report"]

    assert report() == SCRIPT.with_name("loss_paths.md").read_text()
