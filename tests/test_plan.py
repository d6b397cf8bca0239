"""A plan's file: read back as it was, a recipe wherever one is read, hashed alike."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from memplan.errors import InputError
from memplan.footprint import Footprint, Moment
from memplan.gpu import find_gpu
from memplan.plan import Plan, Rejected
from memplan.recipe import Recipe, read_recipe_text
from memplan.reporters.schema import output_schema, plan_schema

CARD = find_gpu("RTX 3060", reserve_bytes=2**29)
GIB = 2**30


def plan(**keys: Any) -> Plan:
    """A small plan made by hand."""
    moments = tuple(
        Moment(
            label=label,
            allocated_bytes=allocated * GIB,
            reserved_bytes=(allocated + 1) * GIB,
            breakdown={"weights": allocated * GIB},
        )
        for label, allocated in (("load", 3), ("1.forward", 5), ("1.backward", 6))
    )
    footprint = Footprint(
        moments=moments,
        context_bytes=CARD.context_bytes,
        paged_bytes=7,
        capacity_bytes=CARD.budget_bytes + CARD.context_bytes,
    )
    found = {
        "model": "meta-llama/Llama-2-7b-hf",
        "recipe": Recipe(quantization="nf4-double", rank_pattern={r"layers\.1\.x": 8}),
        "gpu": CARD,
        "footprint": footprint,
        "parameters": {"total": 10, "trainable": 2},
        "verified_by": "simulation",
        "prefer": "quality",
        "prior": "robust",
        "tier": "T0",
        "solution": {"solver": "milp", "gap": 0.0},
        "regrets": {"uniform": 0.01},
        "reasons": ("It fits.",),
        "alternatives": ({"sequence_length": 1024},),
        "rejected": (
            Rejected(changes={"batch_size": 2}, reason="Too large.", missing_bytes=5),
        ),
        "notes": ("A note.",),
        "versions": {"memplan": "0.1.0"},
    }
    return Plan(**found | keys)


def test_plan_is_read_back_as_it_was_written() -> None:
    written = json.loads(json.dumps(plan().to_json(), allow_nan=False))

    assert Plan.from_json(written).to_json() == written


def test_plan_s_file_is_a_recipe_file() -> None:
    keys, model = read_recipe_text(json.dumps(plan().to_json()), "--recipe")

    assert Recipe.from_mapping(keys) == plan().recipe
    assert model == "meta-llama/Llama-2-7b-hf"


def test_plan_s_file_holds_to_both_schemas() -> None:
    written = json.loads(json.dumps(plan().to_json(), allow_nan=False))

    jsonschema.validate(written, plan_schema())
    jsonschema.validate(written, output_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written | {"kind": "simulation"}, plan_schema())


def test_hash_tells_decisions_apart_and_nothing_else() -> None:
    one = plan()

    assert one.hash == plan(reasons=(), versions={}).hash
    assert one.hash != plan(recipe=Recipe()).hash
    assert one.hash != plan(model="other").hash
    assert one.hash != plan(gpu=find_gpu("RTX 3060")).hash
    assert len(one.hash) == 16


def test_margin_and_fit_are_those_of_the_footprint() -> None:
    written = plan().to_json()

    assert written["fits"] is True
    decided = written["plan"]
    assert decided["margin_bytes"] == CARD.budget_bytes - 7 * GIB
    assert decided["budget_bytes"] == CARD.budget_bytes


@pytest.mark.parametrize("key", ["plan", "gpu", "moments", "recipe"])
def test_what_is_no_plan_is_refused(key: str) -> None:
    written = plan().to_json()
    del written[key]

    with pytest.raises(InputError, match="is no plan"):
        Plan.from_json(written)


def test_card_is_read_back_as_it_was_written() -> None:
    for name in ("RTX 3060", "12GB", "H200"):
        card = find_gpu(name)
        assert type(card).from_json(json.loads(json.dumps(card.to_json()))) == card
