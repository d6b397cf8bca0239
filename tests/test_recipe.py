from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner

from memplan.commands.options import (
    LARGEST_RECIPE_BYTES,
    model_argument,
    read_recipe_file,
    recipe_options,
    take_recipe,
)
from memplan.errors import InputError, UnknownNameError
from memplan.recipe import (
    Recipe,
    field_names,
    presets,
    read_recipe_text,
    recipe_schema,
)

DEFAULTS: dict[str, Any] = {
    "trainer": "plain",
    "method": "lora",
    "rank": 16,
    "alpha": 32.0,
    "dropout": 0.0,
    "targets": "all-linear",
    "rank_pattern": {},
    "alpha_pattern": {},
    "lambda_pattern": {},
    "trained_modules": [],
    "method_options": {},
    "adapter_dtype": "float32",
    "input_casts": True,
    "dtype": "bfloat16",
    "autocast": "none",
    "quantization": "none",
    "unquantized_modules": ["lm_head"],
    "compute_dtype": "bfloat16",
    "kbit_prepare": True,
    "optimizer": "adamw",
    "max_grad_norm": None,
    "batch_size": 1,
    "sequence_length": 512,
    "accumulation": 1,
    "padded": False,
    "checkpointing": "none",
    "every_n_layers": 1,
    "offload": False,
    "reentrant": False,
    "loss": "full",
    "attention": "auto",
    "keep_outputs": "backward",
}
"""The interface: other programs are built on these keys and defaults."""


def test_keys_and_defaults() -> None:
    assert Recipe().to_json() == DEFAULTS
    assert list(field_names()) == list(DEFAULTS)


def test_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().rank = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        Recipe().rank_pattern["q_proj"] = 8  # type: ignore[index]


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert Recipe(rank=8).alpha == 16
    assert Recipe(rank=8, alpha=8).alpha == 8


@pytest.mark.parametrize(
    ("trainer", "quantization", "changed"),
    [
        ("plain", "nf4", {}),
        ("transformers", "none", {"max_grad_norm": 1.0, "keep_outputs": "none"}),
        (
            "trl",
            "none",
            {
                "max_grad_norm": 1.0,
                "keep_outputs": "none",
                "autocast": "bfloat16",
                "kbit_prepare": False,
                "loss": "chunked",
            },
        ),
        (
            "trl",
            "nf4-double",
            {
                "max_grad_norm": 1.0,
                "keep_outputs": "none",
                "autocast": "bfloat16",
                "kbit_prepare": False,
                "loss": "chunked",
                "adapter_dtype": "bfloat16",
            },
        ),
    ],
)
def test_trainer_sets_what_its_loop_does(
    trainer: str, quantization: str, changed: dict[str, Any]
) -> None:
    recipe = Recipe(trainer=trainer, quantization=quantization)

    named = {"trainer": trainer, "quantization": quantization}
    assert recipe.to_json() == DEFAULTS | named | changed


@pytest.mark.parametrize("trainer", ["plain", "transformers", "trl"])
def test_given_keys_win_over_the_trainer(trainer: str) -> None:
    given = {
        "adapter_dtype": "float16",
        "autocast": "float16",
        "kbit_prepare": trainer == "trl",
        "max_grad_norm": 0.3,
        "loss": "full",
        "keep_outputs": "step",
    }

    recipe = Recipe.from_mapping({"trainer": trainer, **given})

    assert given.keys() == presets(trainer, "none").keys()
    assert {key: getattr(recipe, key) for key in given} == given


def test_null_is_a_given_value() -> None:
    assert Recipe(trainer="transformers", max_grad_norm=None).max_grad_norm is None


def test_tokens_of_a_micro_batch() -> None:
    assert Recipe(batch_size=3, sequence_length=100, accumulation=4).tokens == 300


def test_unknown_key_lists_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="recipe key: 'batchsize'") as error:
        Recipe.from_mapping({"batchsize": 2})

    assert "near: batch_size" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "rank: 0 is below 1; give a whole number of 1 or more"),
        ({"dropout": 1}, "dropout: 1 is out of range; give a number of at least 0"),
        ({"quantization": "nf5"}, "quantization: 'nf5' is unknown; near: nf4"),
        ({"optimizer": "adam"}, "optimizer: 'adam' is unknown; near: adamw"),
        ({"trainer": "plane"}, "trainer: 'plane' is unknown; near: plain"),
        ({"sequence_length": 512.0}, "sequence_length: 512.0 is not a whole number"),
    ],
)
def test_bad_value_names_its_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.from_mapping(keys)

    assert str(error.value).startswith(message)


def test_recipe_survives_its_own_json() -> None:
    recipe = Recipe(
        trainer="trl",
        quantization="nf4",
        targets=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 4},
        method_options={"lambda": 2},
    )

    text = json.dumps(recipe.to_json())

    assert Recipe.from_mapping(read_recipe_text(text, "file")[0]) == recipe
    jsonschema.validate(recipe.to_json(), recipe_schema())


def test_schema_has_every_key_and_no_other() -> None:
    schema = recipe_schema()

    assert list(schema["properties"]) == list(DEFAULTS)
    with pytest.raises(jsonschema.ValidationError, match="batchsize"):
        jsonschema.validate({"batchsize": 1}, schema)


def test_schema_tells_the_defaults_that_no_trainer_changes() -> None:
    told = {
        key: value["default"]
        for key, value in recipe_schema()["properties"].items()
        if "default" in value
    }

    assert DEFAULTS.keys() - told.keys() == {"alpha", *presets("plain", "none")}
    assert told == {key: DEFAULTS[key] for key in told}


@pytest.mark.parametrize(
    "text",
    [
        '{"rank": 8, "targets": ["q_proj"]}',
        "rank: 8\ntargets: [q_proj]\n",
        "# a comment\nrank: 8\ntargets:\n- q_proj\n",
    ],
)
def test_json_and_yaml_are_told_by_content(text: str) -> None:
    assert read_recipe_text(text, "file") == ({"rank": 8, "targets": ["q_proj"]}, None)


def test_printed_object_is_a_recipe_and_names_its_model() -> None:
    plan = {"schema": 1, "kind": "plan", "model": "gpt2", "recipe": {"rank": 4}}

    assert read_recipe_text(json.dumps(plan), "file") == ({"rank": 4}, "gpt2")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[1]", "is not a mapping of keys"),
        ("rank", "is not a mapping of keys"),
        ('{"rank": 8', "is not valid YAML"),
        ("rank: [", "is not valid YAML"),
        ("rank: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_text_that_is_no_recipe_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read_recipe_text(text, "--recipe")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        read_recipe_file(str(tmp_path / "none.yaml"))


def test_large_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_bytes(b" " * (LARGEST_RECIPE_BYTES + 1))

    with pytest.raises(InputError, match="is larger than 1 MiB"):
        read_recipe_file(str(file))


@click.command()
@click.argument("model", required=False)
@recipe_options
def show(model: str | None, **options: Any) -> None:
    """Stands for any command that takes a recipe: prints what it took."""
    recipe, named = take_recipe(options)
    click.echo(json.dumps([model_argument(model, named), recipe.to_json(), options]))


def taken(*arguments: str, stdin: str = "") -> tuple[str, dict[str, Any]]:
    result = CliRunner().invoke(show, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model, recipe, others = json.loads(result.stdout)
    assert others == {}
    return model, recipe


def test_no_options_mean_the_defaults() -> None:
    assert taken("gpt2") == ("gpt2", DEFAULTS)


def test_options_are_keys_with_dashes() -> None:
    _, recipe = taken(
        *("gpt2", "--rank", "8", "--max-grad-norm", "0.3", "--padded", "true"),
        *("--targets", "q_proj,v_proj", "--rank-pattern", '{"v_proj": 4}'),
    )

    assert recipe == DEFAULTS | {
        "rank": 8,
        "alpha": 16.0,
        "max_grad_norm": 0.3,
        "padded": True,
        "targets": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 4},
    }


def test_short_names_of_options() -> None:
    _, recipe = taken("gpt2", "--batch", "4", "--seq", "2048")

    assert (recipe["batch_size"], recipe["sequence_length"]) == (4, 2048)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("rank: 8\ntrainer: trl\n")

    _, recipe = taken("gpt2", "--recipe", str(file), "--rank", "4")

    assert (recipe["rank"], recipe["trainer"], recipe["loss"]) == (4, "trl", "chunked")


def test_recipe_is_read_from_standard_input() -> None:
    model, recipe = taken(
        "--recipe", "-", stdin='{"model": "m", "recipe": {"rank": 2}}'
    )

    assert (model, recipe["rank"]) == ("m", 2)


def test_model_that_is_given_wins_over_the_plan_s() -> None:
    model, _ = taken("gpt2", "--recipe", "-", stdin='{"model": "m", "recipe": {}}')

    assert model == "gpt2"


def test_missing_model_is_refused() -> None:
    with pytest.raises(InputError, match="MODEL: '' is missing"):
        taken("--rank", "8")


def test_bad_option_is_refused_by_its_key() -> None:
    with pytest.raises(InputError, match="rank: 'eight' is not a whole number"):
        taken("gpt2", "--rank", "eight")


def test_every_key_has_an_option_with_its_help() -> None:
    help_text = CliRunner().invoke(show, ["--help"]).stdout

    for key in field_names():
        assert f"--{key.replace('_', '-')} " in help_text.replace(",", " ")
