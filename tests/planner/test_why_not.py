"""Why a recipe does not fit, over a closed form whose answers are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from closed_form import estimate_of, footprint

from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.planner.why_not import LENGTH_STEP, Question, rejected
from memplan.recipe import Recipe

LLAMA = inspect("meta-llama/Llama-2-7b-hf")
GIB = 2**30


def question(gpu: str = "12GB", **keys: Any) -> Question:
    card = find_gpu(gpu)
    return Question(
        architecture=LLAMA,
        recipe=Recipe(**keys),
        gpu=card,
        estimate=estimate_of(LLAMA, card),
    )


QLORA = {"quantization": "nf4-double", "checkpointing": "full"}


def test_sixteen_bits_on_a_small_card_are_fixed_by_quantising() -> None:
    asked = question()

    assert asked.missing_bytes > 0
    assert all(one.changes.keys() & {"quantization"} for one in asked.fixes)
    best = asked.fixes[0]
    assert footprint(LLAMA, best.recipe, asked.gpu).life_peak.reserved_bytes <= (
        asked.gpu.budget_bytes
    )


def test_saving_is_the_difference_of_two_estimates() -> None:
    asked = question(**QLORA)
    before = asked.footprint.life_peak.reserved_bytes

    for one in asked.single_changes:
        after = footprint(LLAMA, one.recipe, asked.gpu).life_peak.reserved_bytes
        assert one.saved_bytes == before - after
        assert one.fits == (after <= asked.gpu.budget_bytes)


def test_changes_are_of_one_knob_and_change_it() -> None:
    asked = question(**QLORA, batch_size=2)

    for one in asked.single_changes:
        for key, value in one.changes.items():
            assert getattr(asked.recipe, key) != value
            assert getattr(one.recipe, key) == value
    keys = {key for one in asked.single_changes for key in one.changes}
    assert {"checkpointing", "optimizer", "rank", "batch_size", "loss"} <= keys


def test_pairs_are_looked_at_only_where_no_single_change_fits() -> None:
    asked = question("7GB", batch_size=4, sequence_length=1024)

    assert not any(one.fits for one in asked.single_changes)
    assert all(len(one.changes) >= 2 for one in asked.fixes)


def test_verdict_and_fixes_are_those_that_are_confirmed() -> None:
    """All is two GiB larger when it is confirmed."""
    card = find_gpu("12GB")
    estimate = estimate_of(LLAMA, card)

    def confirm(recipe: Recipe) -> Footprint:
        found = footprint(LLAMA, recipe, card)
        worse = [
            dataclasses.replace(m, reserved_bytes=m.reserved_bytes + 2 * GIB)
            for m in found.moments
        ]
        return dataclasses.replace(found, moments=tuple(worse))

    recipe = Recipe(**QLORA, sequence_length=question(**QLORA).longest())
    asked = Question(
        architecture=LLAMA, recipe=recipe, gpu=card, estimate=estimate, confirm=confirm
    )

    assert 0 < asked.missing_bytes <= 2 * GIB
    assert asked.fixes
    for one in asked.fixes:
        found = confirm(one.recipe).life_peak.reserved_bytes
        assert one.missing_bytes == found - card.budget_bytes <= 0


def test_what_hardly_helps_is_told() -> None:
    little = question(**QLORA, sequence_length=4096, rank=2).of_little_help

    assert any("optimizer" in one.changes for one in little)


def test_floor_is_below_every_single_change() -> None:
    asked = question(batch_size=4)

    floor = asked.floor.life_peak.reserved_bytes

    before = asked.footprint.life_peak.reserved_bytes
    assert all(floor <= before - one.saved_bytes for one in asked.single_changes)


def test_a_gib_more_buys_a_longer_sequence() -> None:
    asked = question(**QLORA)

    as_it_is, with_more = asked.next_gib()

    assert as_it_is is not None
    assert with_more is not None
    assert as_it_is < with_more
    estimate = estimate_of(LLAMA, asked.gpu)
    fits = Recipe(**QLORA, sequence_length=as_it_is)
    longer = Recipe(**QLORA, sequence_length=as_it_is + LENGTH_STEP)
    budget = asked.gpu.budget_bytes
    assert estimate(fits).life_peak.reserved_bytes <= budget
    assert estimate(longer).life_peak.reserved_bytes > budget


def test_no_length_fits_where_the_weights_do_not() -> None:
    assert question("4GB", **QLORA).longest() in (None, LENGTH_STEP)
    assert question("3GB", **QLORA).longest() is None


def test_recipes_that_cannot_run_are_passed_over() -> None:
    card = find_gpu("12GB")

    def estimate(recipe: Recipe) -> Footprint:
        if recipe.loss == "liger":
            raise InputError("loss", "liger", "cannot run", "use full")
        return footprint(LLAMA, recipe, card)

    asked = Question(
        architecture=LLAMA, recipe=Recipe(**QLORA), gpu=card, estimate=estimate
    )

    assert asked.single_changes
    assert not any("loss" in one.changes for one in asked.single_changes)


def test_what_is_faster_and_does_not_fit_is_rejected() -> None:
    asked = question(**QLORA)

    for one in rejected(asked.single_changes):
        assert one.speed > 1
        assert one.missing_bytes > 0


@pytest.mark.parametrize("gpu", ["12GB", "RTX 3060"])
def test_doubts_are_of_verdicts_that_are_near(gpu: str) -> None:
    assert not [*question("80GB", **QLORA).doubts()]
    asked = question(gpu, **QLORA)
    longest = asked.longest()
    near = question(gpu, **QLORA, sequence_length=longest)
    assert len([*near.doubts()]) == 2
