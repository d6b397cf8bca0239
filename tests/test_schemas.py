"""The published schemas are what memplan prints, and what it prints holds to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import run

from memplan.footprint import CATEGORIES, Footprint, Moment
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.reporters.json import footprint_object
from memplan.reporters.schema import KINDS, output_schema

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"


@pytest.mark.parametrize("which", ["recipe", "output", "profile", "plan"])
def test_published_schema_is_what_the_command_prints(which: str) -> None:
    ran = run("schema", which)

    assert ran.code == 0
    assert (SCHEMAS / f"{which}.schema.json").read_text() == ran.out
    jsonschema.Draft202012Validator.check_schema(json.loads(ran.out))


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["inspect", "meta-llama/Llama-2-7b-hf"], "architecture"),
        (["inspect", "google/gemma-4-26B-A4B"], "architecture"),
        (["inspect", "google-bert/bert-base-uncased"], "architecture"),
        (["models"], "models"),
        (["models", "no such model"], "models"),
        (["gpus"], "gpus"),
    ],
)
def test_printed_object_holds_to_the_schema(arguments: list[str], kind: str) -> None:
    ran = run(*arguments, "--json")

    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    jsonschema.validate(printed, output_schema())
    assert printed["kind"] == kind
    assert kind in KINDS


def simulation(gpu: str | None) -> dict[str, Any]:
    """The object of a small footprint made by hand."""
    moments = tuple(
        Moment(label=label, allocated_bytes=allocated, reserved_bytes=2**21)
        for label, allocated in (("load", 5), ("1.forward", 9), ("1.backward", 7))
    )
    found = None if gpu is None else find_gpu(gpu)
    footprint = Footprint(
        moments=moments,
        context_bytes=None if found is None else found.context_bytes,
        capacity_bytes=None if found is None else found.capacity_bytes,
        notes=("a note",),
    )
    counts = {"total": 10, "trainable": 2}
    return footprint_object("simulation", "own", Recipe(), found, footprint, counts)


@pytest.mark.parametrize("gpu", [None, "12GB", "RTX 4090"])
def test_footprint_s_object_holds_to_the_schema(gpu: str | None) -> None:
    printed = json.loads(json.dumps(simulation(gpu), allow_nan=False))

    jsonschema.validate(printed, output_schema())
    assert printed["recipe"] == Recipe().to_json()
    assert (printed["fits"], printed["gpu"] is None) == (
        (None, True) if gpu is None else (True, False)
    )
    assert printed["breakdown"].keys() == set(CATEGORIES)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "guess"},
        {"schema": 2},
        {"peak": {"moment": "1.forward"}},
        {"notes": "a note"},
        {"fits": "yes"},
    ],
)
def test_schema_refuses_what_is_not_printed(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(simulation(None) | change, output_schema())


@pytest.mark.parametrize("key", ["model", "recipe", "moments", "breakdown", "versions"])
def test_schema_asks_for_every_key(key: str) -> None:
    printed = simulation(None)
    del printed[key]

    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(printed, output_schema())
