"""Measured on a CPU by two readers, beside what is simulated for a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import cpu_report
import pytest
from cpu_report import CASES, CONFIGS, WORST, Compared

from memplan.recipe import Recipe

SLICE = (0, 4, 5, 20)
"""One of each trainer, and experts."""


@pytest.fixture(scope="module")
def compared() -> Sequence[Compared]:
    with cpu_report.quiet():
        return [cpu_report.compare(number) for number in range(len(CASES))]


def check(each: Compared) -> None:
    for reader, found in each.errors.items():
        assert len(found) >= 15
        for reading, error in found.items():
            if not each.judges(reader, reading):
                continue
            assert abs(error) <= WORST, f"{reader}, {reading}: {error:+.2%}"


@pytest.mark.parametrize("number", SLICE)
def test_simulation_is_what_both_readers_see(number: int) -> None:
    with cpu_report.quiet():
        each = cpu_report.compare(number)

    check(each)


def test_all_of_them_are_covered() -> None:
    recipes = [Recipe(**keys) for _, keys in CASES]

    assert len(CASES) >= 20
    assert len({family for family, _ in CASES}) == len(CONFIGS) >= 6
    assert {recipe.trainer for recipe in recipes} == {"plain", "transformers", "trl"}
    asked = {recipe.quantization for recipe in recipes}
    assert asked == set(quantizations_of_bitsandbytes())
    assert {recipe.method for recipe in recipes} == {"full", "lora", "rslora", "dora"}


def quantizations_of_bitsandbytes() -> list[str]:
    return ["none", "int8", "nf4", "nf4-double", "fp4", "fp4-double"]


@pytest.mark.slow
def test_every_simulation_is_what_both_readers_see(
    compared: Sequence[Compared],
) -> None:
    for each in compared:
        check(each)


@pytest.mark.slow
def test_committed_report_is_what_is_measured(compared: Sequence[Compared]) -> None:
    """To a hundredth of a per cent, since generators' states and the like differ."""
    committed = cpu_report.REPORT.read_text(encoding="utf-8").splitlines()
    found = cpu_report.report(compared).splitlines()

    assert [line.split("|")[:4] for line in committed] == [
        line.split("|")[:4] for line in found
    ]
