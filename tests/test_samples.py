"""The sample reports are what their commands write, number by number."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "reports" / "make_samples.py"
MAKER = runpy.run_path(str(SCRIPT))
FOLDER = SCRIPT.with_name("samples")

LARGEST_HTML_BYTES = 300_000
LARGEST_VALIDATION_BYTES = 900_000
"""340 runs by two ways: for each a row, three points and its numbers, 1.3 kB in all."""
LARGEST_BYTES = 2_000_000


def numbers_of(file: Path) -> Any:
    (text,) = re.findall(r'id="numbers">(.*?)</script>', file.read_text(), re.DOTALL)
    return json.loads(text)


def check(name: str, asked: tuple[str, ...], out: Path) -> None:
    MAKER["make"](name, asked, out)
    made, kept = out / f"{name}.html", FOLDER / f"{name}.html"

    assert numbers_of(made) == numbers_of(kept), (
        f"python {SCRIPT} {name} makes it again"
    )
    pictures = sorted(file.name for file in (FOLDER / name).iterdir())
    assert pictures == sorted(file.name for file in (out / name).iterdir())


@pytest.mark.parametrize("name", MAKER["SAMPLES"])
def test_a_sample_is_what_its_command_writes(name: str, tmp_path: Path) -> None:
    check(name, MAKER["SAMPLES"][name], tmp_path)


@pytest.mark.slow
def test_the_validation_is_what_its_command_writes(tmp_path: Path) -> None:
    check("validation", MAKER["VALIDATION"]["validation"], tmp_path)


@pytest.mark.slow
def test_the_plan_is_what_its_command_prints() -> None:
    made = json.loads(MAKER["memplan"]("plan", *MAKER["PLANNED"], "--json"))
    kept = json.loads((FOLDER / "plan.json").read_text())

    assert made["plan"]["hash"] == kept["plan"]["hash"]
    assert made["peak"] == kept["peak"]


def test_samples_are_small() -> None:
    sizes = {file: file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()}

    assert sum(sizes.values()) < LARGEST_BYTES
    for file, size in sizes.items():
        is_validation = file.name == "validation.html"
        most = LARGEST_VALIDATION_BYTES if is_validation else LARGEST_HTML_BYTES
        assert size < most, file
