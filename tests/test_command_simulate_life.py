"""`memplan simulate` of a whole life: moments, the host, the timeline, bad input."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import run

from memplan.reporters.schema import output_schema

SMALL = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
LEARNED = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 1000,
}
SHORT = ("--seq", "48")
STEPS = ["1.forward", "1.backward", "1.optimizer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("small") / "config.json"
    file.write_text(json.dumps(SMALL))
    return str(file)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("learned") / "config.json"
    file.write_text(json.dumps(LEARNED))
    return str(file)


def simulate(*arguments: str) -> dict[str, Any]:
    ran = run("simulate", *arguments, "--json")
    assert ran.err == ""
    found = json.loads(ran.out)
    jsonschema.validate(found, output_schema())
    return found | {"exit": ran.code}


def labels(found: dict[str, Any]) -> list[str]:
    return [moment["label"] for moment in found["moments"]]


def test_a_whole_life_has_every_moment(model: str) -> None:
    found = simulate(model, *SHORT, "--life", "--generate", "5", "--gpu", "12GB")

    assert (found["exit"], found["fits"]) == (0, True)
    before, after = labels(found)[:3], labels(found)[-4:]
    assert before == ["load", "adapt", "resume"]
    assert after == ["evaluate", "generate", "save", "merge"]
    assert labels(found)[3:6] == STEPS
    assert [*found["host"]] == [
        "mapped_bytes",
        "load_bytes",
        "resume_bytes",
        "save_bytes",
        "merge_bytes",
    ]


@pytest.mark.parametrize(
    ("asked", "moments"),
    [
        ((), []),
        (("--eval-batch", "2"), ["evaluate"]),
        (("--prediction-loss-only",), ["evaluate"]),
        (("--generate", "3", "--save"), ["generate", "save"]),
        (("--merge", "card"), ["merge"]),
        (("--merge", "host"), []),
    ],
)
def test_only_what_is_asked_for_happens(
    model: str, asked: tuple[str, ...], moments: list[str]
) -> None:
    found = simulate(model, *SHORT, *asked)
    assert labels(found)[8:] == moments
    assert ("merge_bytes" in found["host"]) == ("--merge" in asked)


def test_the_steps_peak_is_that_without_the_life(model: str) -> None:
    plain = simulate(model, *SHORT)
    lived = simulate(model, *SHORT, "--eval-batch", "64", "--merge", "card")

    assert lived["peak"] == plain["peak"]
    assert lived["life_peak"]["moment"] == "evaluate"
    assert lived["life_peak"]["allocated_bytes"] > plain["life_peak"]["allocated_bytes"]


def test_an_evaluation_that_does_not_fit_exits_with_1(model: str) -> None:
    arguments = (model, "--gpu", "300MB", "--context", "100MB", "--seq", "256")
    assert run("simulate", *arguments).code == 0

    ran = run("simulate", *arguments, "--eval-batch", "256")
    assert ran.code == 1
    assert "runs out of memory in evaluate" in ran.out


def test_what_is_assumed_is_said(model: str) -> None:
    out = run(
        "simulate",
        model,
        *SHORT,
        *("--quantization", "nf4", "--trainer", "transformers"),
        *("--optimizer", "paged-adamw-8bit", "--life", "--generate", "2"),
    ).out
    for words in (
        "2 batches of 8 on the card",
        "--prediction-loss-only",
        "--merge host merges into bfloat16",
        "its first step finds the optimizer's state",
        "are not paged",
        "Host memory beside",
    ):
        assert words in out


def test_a_timeline_as_csv(model: str, tmp_path: Path) -> None:
    file = tmp_path / "life.csv"
    found = simulate(model, *SHORT, "--merge", "card", "--timeline", str(file))

    with file.open(newline="") as lines:
        rows = [*csv.DictReader(lines)]
    assert [*rows[0]] == [
        "index",
        "moment",
        "allocated_bytes",
        "reserved_bytes",
        "operator",
        "module",
        "category",
    ]
    assert [int(row["index"]) for row in rows] == [*range(len(rows))]
    assert [*dict.fromkeys(row["moment"] for row in rows)] == labels(found)
    peak = max(int(row["allocated_bytes"]) for row in rows)
    assert peak == found["life_peak"]["allocated_bytes"]


def test_a_timeline_as_json(model: str, tmp_path: Path) -> None:
    file = tmp_path / "life.JSON"
    found = simulate(model, *SHORT, "--timeline", str(file))

    written = json.loads(file.read_text())
    assert (written["schema"], written["kind"]) == (1, "timeline")
    reserved = max(event["reserved_bytes"] for event in written["events"])
    assert reserved == found["life_peak"]["reserved_bytes"]
    assert written["events"][-1]["moment"] == "2.optimizer"
    assert [*tmp_path.iterdir()] == [file]


def test_a_timeline_is_written_for_what_was_kept(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path / "cache"))
    first = simulate(model, *SHORT)
    file = tmp_path / "life.csv"
    again = simulate(model, *SHORT, "--timeline", str(file))

    assert again == first
    assert file.exists()
    assert simulate(model, *SHORT, "--save") != first


@pytest.mark.parametrize("name", ["life.txt", "life", "missing/life.csv", "."])
def test_a_timeline_that_cannot_be_written_leaves_nothing(
    model: str, tmp_path: Path, name: str
) -> None:
    ran = run("simulate", model, "--timeline", str(tmp_path / name), "--json")

    assert (ran.code, ran.out) == (2, "")
    assert "--timeline" in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_timeline_in_a_folder_that_is_closed(model: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    ran = run("simulate", model, *SHORT, "--timeline", str(tmp_path / "life.csv"))
    assert (ran.code, ran.out) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "full", "--merge", "card"), ("--merge", "'card'", "full")),
        (("--merge", "disk"), ("--merge", "disk", "card")),
        (("--eval-batch", "0"), ("--eval-batch", "0")),
        (("--generate", "many"), ("--generate", "many")),
    ],
)
def test_bad_input_is_said(
    model: str, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ran = run("simulate", model, *arguments)

    assert (ran.code, ran.out) == (2, "")
    for word in words:
        assert word in ran.err


def test_learned_positions_bound_what_is_generated(gpt2: str) -> None:
    ran = run("simulate", gpt2, *SHORT, "--generate", "17")
    assert (ran.code, ran.out) == (2, "")
    for word in ("--generate", "17", "64 positions", "at most 16"):
        assert word in ran.err

    assert labels(simulate(gpt2, *SHORT, "--generate", "16"))[-1] == "generate"
