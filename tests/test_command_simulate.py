"""`memplan simulate` as a person runs it: verdicts, JSON, exit codes, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import run

from memplan import registry
from memplan.reporters.schema import output_schema

SMALL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("small") / "config.json"
    file.write_text(json.dumps(SMALL))
    return str(file)


def simulate(*arguments: str, stdin: str = "") -> dict[str, Any]:
    ran = run("simulate", *arguments, "--json", stdin=stdin)
    assert ran.err == ""
    return json.loads(ran.out) | {"exit": ran.code}


def test_the_object_holds_to_its_schema(model: str) -> None:
    found = simulate(model, "--gpu", "T4", "--dtype", "float16")
    exit_code = found.pop("exit")

    jsonschema.validate(found, output_schema())
    assert exit_code == 0
    assert found["fits"] is True
    assert found["kind"] == "simulation"
    assert [moment["label"] for moment in found["moments"]] == [
        "load",
        "adapt",
        "1.forward",
        "1.backward",
        "1.optimizer",
        "2.forward",
        "2.backward",
        "2.optimizer",
    ]


def test_the_breakdown_sums_to_device_bytes(model: str) -> None:
    found = simulate(model, "--gpu", "12GB")
    assert sum(found["breakdown"].values()) == found["peak"]["device_bytes"]


def test_without_a_card_it_sums_to_reserved_bytes(model: str) -> None:
    found = simulate(model)
    assert found["gpu"] is None
    assert found["fits"] is None
    assert found["peak"]["device_bytes"] is None
    assert sum(found["breakdown"].values()) == found["peak"]["reserved_bytes"]


def test_trained_parameters_are_counted(model: str) -> None:
    # r (i + o) over q, o: 256 + 256; k, v: 256 + 128; gate, up, down: 256 + 512.
    per_layer = 2 * 512 + 2 * 384 + 3 * 768
    found = simulate(model, "--rank", "4")
    assert (
        found["parameters"]["trainable"] == 4 * per_layer * SMALL["num_hidden_layers"]
    )


def test_a_card_too_small_exits_with_1_and_says_where(model: str) -> None:
    arguments = (model, "--gpu", "300MB", "--context", "100MB", "--seq", "2048")
    ran = run("simulate", *arguments, "--batch", "8")

    assert ran.code == 1
    assert "Does not fit on 300MB: runs out of memory in" in ran.out
    found = simulate(*arguments, "--batch", "8")
    assert (found["exit"], found["fits"]) == (1, False)


def test_clipping_is_a_moment(model: str) -> None:
    found = simulate(model, "--max-grad-norm", "1.0")
    assert "2.clip" in [moment["label"] for moment in found["moments"]]


@pytest.mark.parametrize(
    "optimizer", [name for name in registry.names("optimizers") if name != "lora-fa"]
)
def test_groups_with_other_rates_take_no_other_memory(
    model: str, optimizer: str
) -> None:
    def peak(method: str) -> Any:
        asked = ("--method", method, "--optimizer", optimizer)
        return simulate(model, *asked)["peak"]["allocated_bytes"]

    # Where a step holds lists of tensors, it holds those of one group at a time.
    assert peak("lora-plus") == pytest.approx(peak("lora"), rel=0.01)


def test_a_recipe_file_and_options_that_win(model: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 8\nbatch_size: 2\n")

    found = simulate(model, "--recipe", str(recipe), "--rank", "4")

    assert (found["recipe"]["rank"], found["recipe"]["batch_size"]) == (4, 2)


def test_what_it_prints_is_a_recipe_that_names_its_model(model: str) -> None:
    first = run("simulate", model, "--rank", "4", "--json")
    again = simulate("--recipe", "-", stdin=first.out)

    assert again["model"] == model
    assert again["peak"] == json.loads(first.out)["peak"]


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (("--reentrant",), True),
        (("--reentrant", "true"), True),
        (("--reentrant=false",), False),
        (("--no-reentrant",), False),
    ],
)
def test_truth_values_may_be_given_bare(
    model: str, given: tuple[str, ...], held: bool
) -> None:
    found = simulate("--checkpointing", "full", *given, model)
    assert found["recipe"]["reentrant"] is held


def test_the_largest_tensors_are_listed(model: str) -> None:
    ran = run("simulate", model, "--top", "3")

    lines = ran.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("largest"))
    assert len([line for line in lines[start + 1 : start + 4] if "iB" in line]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "loraa"), ("method", "'loraa'", "lora")),
        (("--quantization", "nf5"), ("quantization", "'nf5'", "nf4")),
        (("--optimizer", "adam"), ("optimizer", "'adam'", "adamw")),
        (("--rank", "0"), ("rank", "0", "1 or more")),
        (("--gpu", "12"), ("--gpu", "'12'", "unit")),
        (("--gpu", "rtx 9999"), ("--gpu", "rtx 9999", "size")),
        (("--attention", "flash", "--gpu", "T4"), ("attention", "'flash'", "7.5")),
        (("--attention", "flash", "--padded"), ("attention", "'flash'", "mask")),
        (("--method", "full", "--quantization", "nf4"), ("quantization", "'nf4'")),
        (("--targets", "qq_proj"), ("targets", "'qq_proj'", "q_proj")),
        (("--rank-pattern", '{"nothing": 4}'), ("rank_pattern", "'nothing'")),
        (("--allocator", "max_split_size_mb:1"), ("allocator", "max_split_size_mb")),
        (("--recipe", "/no/such/file"), ("--recipe", "/no/such/file")),
    ],
)
def test_bad_input_is_one_clear_sentence(
    model: str, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ran = run("simulate", model, *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.strip().splitlines()) == 1
    for word in words:
        assert word in ran.err


def test_a_model_must_be_named() -> None:
    ran = run("simulate")
    assert (ran.code, ran.out) == (2, "")
    assert "MODEL" in ran.err
