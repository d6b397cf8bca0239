"""The committed report on the seeds' tables is what its script writes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "reports" / "make_seeds.py"


@pytest.mark.slow
def test_report_is_up_to_date() -> None:
    report = runpy.run_path(str(SCRIPT))["report"]

    assert report() == SCRIPT.with_name("seeds.md").read_text()
