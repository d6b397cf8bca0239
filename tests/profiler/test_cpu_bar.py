"""Measured on a CPU by two readers, beside what is simulated for a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cpu_report
import pytest
from cpu_report import CASES, CONFIGS, WORST, Compared

from memplan import methods, registry
from memplan.recipe import Recipe

SLICE = (
    *(0, 4, 5, 20),
    *(
        number
        for number, (_, keys) in enumerate(CASES)
        if keys.get("method") in ("adaq-lora", "lora-fa")
    ),
)
"""One of each trainer, and experts; what prunes, and an optimizer that reads layers."""


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
    assert {recipe.method for recipe in recipes} == set(registry.names("methods"))
    asked = {recipe.quantization for recipe in recipes}
    assert {kind_of(name) for name in asked} == {
        kind_of(name) for name in registry.names("quantizations")
    }


def kind_of(quantization: str) -> str:
    """A scheme without its width, where it has several that are alike."""
    kind, _, width = quantization.partition("-")
    return kind if width.endswith("bit") or width.startswith("int") else quantization


def test_what_methods_do_between_steps_is_measured_too() -> None:
    """The restart over 16-bit weights, and the pruning, with the step after them."""
    numbers = [n for n, (_, keys) in enumerate(CASES) if milestone_of(keys)]
    found = {milestone_of(CASES[number][1]) for number in numbers}
    with cpu_report.quiet():
        each = cpu_report.compare(numbers[0])

    assert found == {"restart", "prune"}
    assert {"restart", "3.forward", "3.optimizer, end"} <= each.errors["meter"].keys()
    check(each)


def milestone_of(keys: Mapping[str, Any]) -> str | None:
    recipe = Recipe(**keys)
    return methods.find(recipe.method).milestone(recipe)


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
