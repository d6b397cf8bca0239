from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from command_line import run
from measured_runs import measured

from memplan import runs
from memplan.recipe import Recipe
from memplan.reporters.schema import output_schema
from memplan.store import profiles_path


@pytest.fixture
def folder(tmp_path: Path) -> str:
    kept = (
        measured("card-lora"),
        measured("card-full", recipe=Recipe(method="full")),
        measured("card-oom", outcome="out-of-memory", message="CUDA out of memory."),
        measured("cpu-lora", gpu=None, device="cpu"),
    )
    for one in kept:
        runs.save(one, tmp_path)
    return str(tmp_path)


def listed(folder: str, *filters: str) -> list[str]:
    ran = run("runs", "--runs", folder, *filters, "--json")
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    jsonschema.validate(printed, output_schema())
    return [one["id"] for one in printed["runs"]]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ((), ["cpu-lora", "card-full", "card-lora", "card-oom"]),
        (("--method", "full"), ["card-full"]),
        (("--device", "cpu"), ["cpu-lora"]),
        (("--card", "TEST"), ["card-full", "card-lora", "card-oom"]),
        (("--outcome", "out-of-memory"), ["card-oom"]),
        (("--model", "llama"), []),
    ],
)
def test_runs_are_filtered(
    folder: str, filters: tuple[str, ...], expected: list[str]
) -> None:
    assert listed(folder, *filters) == expected


def test_runs_are_a_table(folder: str) -> None:
    ran = run("runs", "--runs", folder)

    assert ran.code == 0
    assert "card-lora" in ran.out
    assert "0.70 GiB" in ran.out
    assert "Runs: 4." in ran.out


def test_a_run_is_shown_whole(folder: str) -> None:
    ran = run("runs", "--runs", folder, "show", "card-oom")

    assert ran.code == 0
    for text in ("CUDA out of memory.", "2.backward", "0.80 GiB", "torch 2.13.0"):
        assert text in ran.out


def test_a_run_is_printed_as_its_file(folder: str) -> None:
    ran = run("runs", "--runs", folder, "show", "card-l", "--json")

    assert json.loads(ran.out) == measured("card-lora").to_json()


def test_an_unknown_run_is_refused(folder: str) -> None:
    ran = run("runs", "--runs", folder, "show", "car-lora")

    assert (ran.code, ran.out) == (2, "")
    assert "near: card-lora" in ran.err


def test_measurements_are_imported_once_however_often(tmp_path: Path) -> None:
    file = str(profiles_path() / "ground_truth" / "published.json")
    for _ in range(2):
        ran = run("runs", "--runs", str(tmp_path), "import", file)
        assert (ran.code, ran.err) == (0, "")
        assert "Runs taken: 24" in ran.out

    assert len(listed(str(tmp_path))) == 24


def test_there_may_be_no_runs(tmp_path: Path) -> None:
    assert listed(str(tmp_path / "none")) == []
