"""Measured runs as they are read, and predictions compared with them."""

from __future__ import annotations

import dataclasses

import pytest

from memplan.catalog import inspect
from memplan.errors import MemplanError
from memplan.footprint import Footprint, Moment
from memplan.store import profiles_path, read_json
from memplan.units import MIB
from memplan.validation import READINGS, Readings, t4_runs

RUNS = t4_runs()
ROWS = read_json(profiles_path() / "ground_truth" / "t4_runs.json")

FOOTPRINT = Footprint(
    moments=(
        Moment(
            label="adapt",
            allocated_bytes=900,
            reserved_bytes=1000,
            end_allocated_bytes=400,
        ),
        Moment(label="1.backward", allocated_bytes=9000, reserved_bytes=9000),
        Moment(label="2.forward", allocated_bytes=600, reserved_bytes=2000),
        Moment(label="2.backward", allocated_bytes=800, reserved_bytes=2200),
        Moment(label="2.optimizer", allocated_bytes=700, reserved_bytes=2100),
    )
)


def test_every_run_is_read() -> None:
    recipes = [run.recipe for run in RUNS]

    assert [run.number for run in RUNS] == list(range(57))
    assert sum(recipe.quantization == "nf4" for recipe in recipes) == 33
    assert sum(recipe.quantization == "none" for recipe in recipes) == 24
    assert {recipe.attention for recipe in recipes} == {"eager", "efficient"}
    assert {recipe.dtype for recipe in recipes} == {"float16"}
    assert {run.gpu.name for run in RUNS} == {"Tesla T4"}
    assert {run.archive for run in RUNS} == {
        "t4-sweep-2026-09-15",
        "t4-phase3-2026-09-16",
    }


def test_a_run_holds_what_its_row_says() -> None:
    run = RUNS[0]

    assert run.model == "Qwen/Qwen2.5-1.5B-Instruct"
    assert run.architecture_name == "Qwen/Qwen2.5-1.5B"
    assert run.recipe.rank == 32
    assert run.recipe.alpha == 64
    assert run.recipe.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert run.recipe.checkpointing == "full"
    assert (run.recipe.batch_size, run.recipe.sequence_length) == (1, 2048)
    assert run.readings.reserved_bytes == 7584 * MIB
    assert run.readings.after_load_bytes == 1647 * MIB + 377 * MIB // 1024


def test_readings_are_whole_blocks() -> None:
    for run in RUNS:
        for reading in READINGS:
            assert getattr(run.readings, reading) % 512 == 0


@pytest.mark.parametrize("number", [0, 4, 8, 33, 41])
def test_catalog_has_the_measured_architecture(number: int) -> None:
    architecture = inspect(RUNS[number].architecture_name)
    config = ROWS[number]["model_config"]

    assert architecture.total_parameters == config["num_params"]
    assert architecture.num_layers == config["num_layers"]
    assert architecture.vocab_size == config["vocab_size"]


def test_readings_of_a_footprint_are_those_of_the_steady_step() -> None:
    assert Readings.of(FOOTPRINT) == Readings(
        after_load_bytes=400,
        forward_bytes=600,
        backward_bytes=800,
        optimizer_bytes=700,
        allocated_bytes=800,
        reserved_bytes=2200,
    )


def test_errors_are_signed_shares_of_the_measured() -> None:
    predicted = Readings.of(FOOTPRINT)
    measured = dataclasses.replace(
        predicted, after_load_bytes=500, reserved_bytes=2000, forward_bytes=600
    )

    errors = predicted.errors(measured)

    assert errors["after_load_bytes"] == pytest.approx(-0.2)
    assert errors["reserved_bytes"] == pytest.approx(0.1)
    assert errors["forward_bytes"] == 0


def test_a_footprint_without_the_second_step_is_refused() -> None:
    short = Footprint(moments=FOOTPRINT.moments[:2])

    with pytest.raises(MemplanError, match=r"2\.forward"):
        Readings.of(short)
