"""`memplan compare` as a person runs it: tables, JSON, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import run
from small_llama import config_file

from memplan.reporters.schema import output_schema


@pytest.fixture
def recipes(tmp_path: Path) -> tuple[str, str]:
    first, second = tmp_path / "a.yaml", tmp_path / "b.json"
    first.write_text("rank: 8\n")
    second.write_text('{"rank": 16, "checkpointing": "full"}')
    return str(first), str(second)


def compare(*arguments: str) -> dict[str, Any]:
    ran = run("compare", *arguments, "--json")
    assert (ran.code, ran.err) == (0, "")
    found: dict[str, Any] = json.loads(ran.out)
    jsonschema.validate(found, output_schema())
    return found


def sides(*files: str) -> list[str]:
    return [part for file in files for part in ("--recipe", file)]


def test_sides_are_the_estimates_of_their_recipes(recipes: tuple[str, str]) -> None:
    found = compare(config_file(), *sides(*recipes), "--gpu", "12GB", "--seq", "256")

    assert found["kind"] == "comparison"
    for side, file in zip(found["sides"], recipes, strict=True):
        alone = run(
            *("estimate", config_file(), "--recipe", file, "--gpu", "12GB"),
            *("--seq", "256", "--json"),
        )
        assert side["peak"] == json.loads(alone.out)["peak"]
        assert side["name"] == file
    (difference,) = found["differences"]
    assert difference["recipe"]["rank"] == [8, 16]
    assert difference["recipe"].keys() == {"rank", "alpha", "checkpointing"}
    one, two = (side["breakdown"]["adapters"] for side in found["sides"])
    assert difference["breakdown"]["adapters"] == two - one == one


def test_sides_and_differences_are_shown(recipes: tuple[str, str]) -> None:
    ran = run("compare", config_file(), *sides(*recipes))

    assert ran.code == 0
    assert f"A: {recipes[0]}, {config_file()} (estimate)" in ran.out
    assert "B - A" in ran.out
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["rank", "8", "16"] in lines
    assert ["checkpointing", "none", "full"] in lines
    assert any(line[:1] == ["2.backward"] for line in lines)


def test_simulations_are_compared_with_what_was_printed(
    recipes: tuple[str, str], tmp_path: Path
) -> None:
    printed = tmp_path / "printed.json"
    estimated = run("estimate", config_file(), "--recipe", recipes[0], "--json")
    printed.write_text(estimated.out)
    found = compare(
        config_file(), *sides(recipes[0]), "--simulate", "--against", str(printed)
    )

    assert [side["kind"] for side in found["sides"]] == ["simulation", "estimate"]
    (difference,) = found["differences"]
    assert difference["recipe"] == {}
    simulated = found["sides"][0]["peak"]["allocated_bytes"]
    assert abs(difference["peak"]["allocated_bytes"]) <= 0.03 * simulated


def test_a_measured_run_is_a_side(recipes: tuple[str, str]) -> None:
    ran = run("compare", config_file(), *sides(recipes[0]), "--against", "t4:3")

    assert ran.code == 0
    assert "B: t4:3, Qwen/Qwen2.5-1.5B-Instruct (measurement)" in ran.out


def test_recipes_may_name_their_models(tmp_path: Path) -> None:
    files = []
    for rank in (4, 8):
        file = tmp_path / f"{rank}.json"
        file.write_text(json.dumps({"model": config_file(), "recipe": {"rank": rank}}))
        files.append(str(file))
    found = compare(*sides(*files))

    assert {side["model"] for side in found["sides"]} == {config_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--recipe", "twice")),
        (("--recipe", "A"), ("--recipe", "'A'", "twice")),
        (("--recipe", "-", "--recipe", "-"), ("--recipe", "'-'", "read twice")),
        (("--recipe", "A", "--recipe", "/no/such"), ("--recipe", "/no/such")),
        (("--recipe", "A", "--against", "/no/such"), ("--against", "/no/such")),
        (("--recipe", "A", "--against", "A"), ("--against", "JSON")),
        (("--recipe", "A", "--against", "t4:99"), ("--against", "t4:56")),
        (("--recipe", "A", "--recipe", "A", "--rank", "0"), ("rank", "0")),
    ],
)
def test_bad_input_is_one_clear_sentence(
    recipes: tuple[str, str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    real = [recipes[0] if argument == "A" else argument for argument in arguments]
    ran = run("compare", config_file(), *real)

    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.strip().splitlines()) == 1
    for word in words:
        assert (Path(recipes[0]).name if word == "'A'" else word) in ran.err
