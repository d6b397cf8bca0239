"""`memplan plan` and `memplan why-not`, whole, on a model that takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import run
from tiny_models import CONFIGS

from memplan.plan import Plan
from memplan.recipe import Recipe
from memplan.reporters.schema import output_schema, plan_schema

SETTLED = ("--loss", "full", "--optimizer", "adamw", "--min-seq", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    config = CONFIGS["llama"] | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def printed(model: str) -> dict[str, Any]:
    """What `plan --json` prints, on a card that nothing fills."""
    ran = run(
        *("plan", model, "--gpu", "RTX 3060", *SETTLED, "--effective-batch", "2"),
        *("--alternatives", "3", "--json"),
    )
    assert (ran.code, ran.err) == (0, "")
    plan: dict[str, Any] = json.loads(ran.out)
    return plan


def test_plan_holds_to_its_schema_and_the_output_s(printed: dict[str, Any]) -> None:
    jsonschema.validate(printed, plan_schema())
    jsonschema.validate(printed, output_schema())


def test_plan_keeps_what_was_settled_and_fits(printed: dict[str, Any]) -> None:
    recipe = printed["recipe"]

    assert (recipe["loss"], recipe["optimizer"]) == ("full", "adamw")
    assert recipe["batch_size"] * recipe["accumulation"] == 2
    assert recipe["sequence_length"] == 16
    assert printed["fits"] is True
    assert printed["plan"]["verified_by"] == "simulation"
    assert 1 <= len(printed["plan"]["alternatives"]) <= 3
    assert "optimal ranks" not in json.dumps(printed)


def test_plan_is_what_simulate_says_of_it(
    printed: dict[str, Any], tmp_path: Path
) -> None:
    """The plan's file is a recipe that names its model."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(printed))

    ran = run("simulate", "--recipe", str(file), "--gpu", "RTX 3060", "--json")

    simulated = json.loads(ran.out)
    assert simulated["peak"] == printed["peak"]
    assert simulated["parameters"] == printed["parameters"]
    assert Recipe.from_mapping(simulated["recipe"]).to_json() == printed["recipe"]


def test_plan_is_exported_with_its_hash(
    printed: dict[str, Any], tmp_path: Path
) -> None:
    ran = run(
        *("export", "-", "--to", "peft", "--out", str(tmp_path / "out")),
        stdin=json.dumps(printed),
    )

    assert ran.code == 0
    said = (tmp_path / "out" / "README.md").read_text()
    assert printed["plan"]["hash"] in said
    assert "by simulation of a plain loop" in said


def test_plan_on_a_terminal_says_why(model: str) -> None:
    ran = run("plan", model, "--gpu", "RTX 3060", *SETTLED, "--checkpointing", "none")

    assert ran.code == 0
    assert "Rank is not the bottleneck" in ran.out
    assert "verified by simulation" in ran.out
    assert "tier T0" in ran.out
    assert "gap" in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--gpu"),
        (["--gpu", "RTX 3060", "--margin", "1"], "--margin"),
        (["--gpu", "RTX 3060", "--margin", "40GB"], "--margin"),
        (["--gpu", "12GB", "--effective-batch", "7", "--batch", "2"], "7 is not made"),
        (["--gpu", "RTX 3060", "--loss", "ful"], "loss"),
    ],
)
def test_plan_refuses_in_a_sentence(
    model: str, arguments: list[str], message: str
) -> None:
    ran = run("plan", model, *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_effective_batch_is_made_of_the_accumulation_that_is_given(model: str) -> None:
    ran = run(
        *("plan", model, "--gpu", "RTX 3060", *SETTLED, "--json"),
        *("--effective-batch", "8", "--accumulation", "4"),
    )

    assert (ran.code, ran.err) == (0, "")
    recipe = json.loads(ran.out)["recipe"]
    assert (recipe["batch_size"], recipe["accumulation"]) == (2, 4)


def test_why_not_answers_as_an_object(model: str) -> None:
    ran = run("why-not", model, "--gpu", "RTX 3060", "--json")

    assert (ran.code, ran.err) == (0, "")
    answer = json.loads(ran.out)
    jsonschema.validate(answer, output_schema())
    assert answer["fits"] is True
    assert answer["missing_bytes"] == 0
    assert answer["longest_sequence"] > 512


def test_why_not_on_a_terminal_lists_what_helps(model: str) -> None:
    ran = run(
        *("why-not", model, "--gpu", "RTX 3060"),
        *("--batch", "512", "--seq", "4096"),
    )

    assert ran.code == 1
    assert "Does not fit" in ran.out
    assert "what makes it fit" in ran.out


def test_plan_for_the_lengths_of_a_data_set(model: str, tmp_path: Path) -> None:
    """The longest sample is planned for, and a batch of several is masked."""
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps({"8": 90, "24": 9, "32": 1}))
    asked = ("plan", model, "--gpu", "RTX 3060", "--loss", "full", "--json")

    ran = run(*asked, "--lengths", str(file), "--batch", "2")

    assert (ran.code, ran.err) == (0, "")
    plan = json.loads(ran.out)
    jsonschema.validate(plan, plan_schema())
    assert (plan["recipe"]["sequence_length"], plan["recipe"]["padded"]) == (32, True)
    lengths = plan["lengths"]
    assert [lengths[key] for key in ("p50", "p99", "max")] == [8, 24, 32]
    assert {one["name"] for one in lengths["batches"]} >= {"packed", "padding-free"}
    assert Plan.from_json(plan).to_json() == plan
    longest, packing = plan["plan"]["reasons"][:2]
    assert "32 tokens; half have no more than 8, and 99 % no more than 24" in longest
    assert "save 70% of the steps" in packing


def test_plan_for_lengths_needs_no_other_floor(model: str, tmp_path: Path) -> None:
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps({"8": 1}))

    ran = run("plan", model, "--gpu", "12GB", "--lengths", str(file), "--min-seq", "9")

    assert (ran.code, ran.out) == (2, "")
    assert "--min-seq" in ran.err


def test_plan_is_what_profile_measures(printed: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(printed))

    ran = run(
        *("profile", "--recipe", str(file), "--device", "cpu", "--steps", "2"),
        *("--out", str(tmp_path / "runs"), "--json"),
    )

    assert ran.code == 0, ran.err
    measured = json.loads(ran.out)
    assert measured["recipe"] == printed["recipe"]
    assert measured["parameters"]["trainable"] == printed["parameters"]["trainable"]
