"""Sides that were printed or measured are the footprints that they were."""

from __future__ import annotations

import json
from typing import Any

import pytest
from small_llama import architecture

from memplan import estimator
from memplan.comparison import Side, differences, measured_t4, side_of
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.reporters.json import footprint_object
from memplan.validation import t4_runs


def printed(recipe: Recipe, gpu: str | None) -> dict[str, Any]:
    card = None if gpu is None else find_gpu(gpu)
    found = estimator.run(architecture(), recipe, card)
    whole = footprint_object(
        "estimate", "small", recipe, card, found.footprint, found.parameters
    )
    read: dict[str, Any] = json.loads(json.dumps(whole))
    return read


@pytest.mark.parametrize("gpu", [None, "12GB"])
def test_a_printed_object_is_read_back(gpu: str | None) -> None:
    data = printed(Recipe(), gpu)
    side = side_of("a.json", data)

    assert side.kind == "estimate"
    assert side.breakdown == data["breakdown"]
    assert side.footprint.peak_json(side.footprint.peak) == data["peak"]
    assert side.to_json()["moments"] == data["moments"]
    assert side.parameters == data["parameters"]


def test_differences_are_subtractions() -> None:
    one = side_of("a", printed(Recipe(rank=8), "12GB"))
    two = side_of("b", printed(Recipe(rank=16), "12GB"))
    (found,) = differences((one, two))

    assert found.recipe == {"rank": (8, 16), "alpha": (16.0, 32.0)}
    assert found.breakdown["adapters"] == (
        two.breakdown["adapters"] - one.breakdown["adapters"]
    )
    assert found.breakdown["context"] == 0
    assert found.readings["device_bytes"] == sum(found.breakdown.values())
    assert found.moments["2.optimizer"] > 0


def test_what_one_side_does_not_know_is_left_out() -> None:
    measured = measured_t4("t4:0")
    (found,) = differences((side_of("a", printed(Recipe(), None)), measured))

    assert found.breakdown == {}
    assert set(found.moments) == {"2.forward", "2.backward", "2.optimizer"}
    assert set(found.readings) == {"allocated_bytes", "reserved_bytes"}


def test_a_measured_run_has_its_readings() -> None:
    run = t4_runs()[5]
    side = measured_t4("t4:5")

    assert side.model == run.model
    assert side.readings == {
        "allocated_bytes": run.readings.allocated_bytes,
        "reserved_bytes": run.readings.reserved_bytes,
    }


def test_a_record_of_a_run_is_read() -> None:
    moments = [
        {"label": "load", "allocated_bytes": 5, "reserved_bytes": 8},
        {"label": "2.backward", "allocated_bytes": 9, "reserved_bytes": 16},
    ]
    record = {
        "kind": "profile",
        "model": "small",
        "recipe": {"rank": 8},
        "footprint": {"moments": moments, "context_bytes": 3, "paged_bytes": 1},
        "parameters": {"total": 4, "trainable": None},
    }
    side = side_of("run.json", record)

    assert side.readings == {
        "allocated_bytes": 9,
        "reserved_bytes": 16,
        "device_bytes": 20,
    }
    assert side.breakdown == {}
    assert side.parameters == {"total": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"moments": []},
        {"moments": 3},
        {"peak": None},
        {"breakdown": {"weights": 1.5}},
        {"kind": ...},
        {"moments": [{"label": "load", "allocated_bytes": True, "reserved_bytes": 1}]},
    ],
)
def test_objects_without_a_footprint_are_refused(change: dict[str, Any]) -> None:
    data = printed(Recipe(), None) | change
    data = {key: value for key, value in data.items() if value is not ...}

    with pytest.raises(InputError, match=r"--against: 'a.json' holds no footprint"):
        side_of("a.json", data)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(InputError, match="is no object"):
        side_of("a.json", [1])


@pytest.mark.parametrize("name", ["t4:57", "t4:", "t4:-1", "t4:x"])
def test_a_run_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="give t4:0 to t4:56"):
        measured_t4(name)


def test_a_side_s_own_object_keeps_its_peak() -> None:
    side = side_of("a", printed(Recipe(), "12GB"))

    assert isinstance(side, Side)
    assert side.to_json()["peak"]["device_bytes"] == sum(side.breakdown.values())
