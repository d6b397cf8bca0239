"""The limits are those that trying every batch and every sequence would find."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from small_llama import CONFIG, architecture

from memplan import estimator
from memplan.catalog import inspect
from memplan.estimator.limits import (
    LENGTH_STEP,
    largest_batch,
    last_fitting,
    limits,
    longest_sequence,
)
from memplan.gpu import Gpu, find_gpu
from memplan.recipe import Recipe

RECIPE = Recipe(sequence_length=256)


def card(size: str) -> Gpu:
    return find_gpu(size, context_bytes=10**8)


def fits(recipe: Recipe, gpu: Gpu) -> bool:
    return bool(estimator.run(architecture(), recipe, gpu).footprint.fits)


@pytest.mark.parametrize("size", ["150MB", "220MB", "500MB"])
def test_one_more_sequence_does_not_fit(size: str) -> None:
    gpu = card(size)
    found = largest_batch(estimator.run(architecture(), RECIPE, gpu), gpu)

    assert found is not None
    assert fits(dataclasses.replace(RECIPE, batch_size=found), gpu)
    assert not fits(dataclasses.replace(RECIPE, batch_size=found + 1), gpu)


@pytest.mark.parametrize("size", ["150MB", "170MB", "190MB"])
def test_a_longer_sequence_does_not_fit(size: str) -> None:
    gpu = card(size)
    found = longest_sequence(estimator.run(architecture(), RECIPE, gpu), gpu)

    assert found is not None
    assert found % LENGTH_STEP == 0
    assert fits(dataclasses.replace(RECIPE, sequence_length=found), gpu)
    longer = dataclasses.replace(RECIPE, sequence_length=found + LENGTH_STEP)
    assert not fits(longer, gpu)


def test_the_model_s_positions_end_sequences() -> None:
    gpu = card("80GB")
    estimate = estimator.run(architecture(), RECIPE, gpu)

    assert longest_sequence(estimate, gpu) == architecture().max_positions


@pytest.mark.parametrize("length", [128, 512])
def test_sequences_outgrow_the_window_of_attention(length: int, tmp_path: Path) -> None:
    """The longest is the same from either side of the window."""
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(CONFIG | {"model_type": "mistral", "sliding_window": 256})
    )
    windowed = inspect(str(file))
    gpu = card("200MB")
    recipe = Recipe(sequence_length=length)
    found = longest_sequence(estimator.run(windowed, recipe, gpu), gpu)

    assert found is not None
    assert 256 < found < CONFIG["max_position_embeddings"]
    for tried, expected in ((found, True), (found + LENGTH_STEP, False)):
        there = dataclasses.replace(recipe, sequence_length=tried)
        footprint = estimator.run(windowed, there, gpu).footprint
        assert footprint.fits is expected


def test_nothing_fits_where_the_weights_do_not() -> None:
    gpu = card("102MB")
    found = limits(estimator.run(architecture(), RECIPE, gpu), gpu)

    assert found.to_json() == {
        "largest_batch_size": None,
        "longest_sequence_length": None,
    }


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("budget", [-1, 0, 1, 5, 999, 10**4, 10**7, 10**9])
@pytest.mark.parametrize("start", [0, 1, 300, 998, 5000])
def test_guesses_find_what_trying_all_does(power: int, budget: int, start: int) -> None:
    values = range(1, 1000, 3)
    fitting = [value for value in values if value**power <= budget]
    asked = []

    def margin(value: int) -> int:
        asked.append(value)
        return budget - value**power

    found = last_fitting(margin, values, start=start)
    assert found == (fitting[-1] if fitting else None)
    assert len(asked) <= 24
