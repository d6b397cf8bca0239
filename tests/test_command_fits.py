"""`memplan fits` as a person runs it: tables, JSON, CSV, exit codes, bad input."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import Ran, run
from small_llama import architecture, config_file

from memplan.architecture import Architecture
from memplan.catalog import CatalogModel, inspect
from memplan.reporters.fits import COLUMNS
from memplan.reporters.schema import output_schema

SMALL = ("--context", "100MB")


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog of a model that fits and two that do not."""
    bert = inspect("google-bert/bert-base-uncased")
    large = inspect("meta-llama/Llama-2-70b-hf")
    models: Sequence[Architecture] = (architecture(), bert, large)
    made = tuple(CatalogModel(architecture=one, facts={}) for one in models)
    monkeypatch.setattr("memplan.commands.fits.catalog_models", lambda: made)


def fits(*arguments: str) -> dict[str, Any]:
    ran = run("fits", *arguments, "--json")
    assert ran.err == ""
    found: dict[str, Any] = json.loads(ran.out)
    jsonschema.validate(found, output_schema())
    return found | {"exit": ran.code}


def test_one_model_is_answered_in_every_way() -> None:
    found = fits(config_file(), "--gpu", "12GB")

    assert (found["exit"], found["kind"]) == (0, "fits")
    assert [(one["method"], one["quantization"]) for one in found["fits"]] == [
        ("full", "none"),
        ("lora", "none"),
        ("lora", "int8"),
        ("lora", "nf4-double"),
    ]
    assert {one["sequence_length"] for one in found["fits"]} == {1024}
    assert {one["longest_sequence_length"] for one in found["fits"]} == {2048}


@pytest.mark.usefixtures("catalog")
def test_the_catalog_is_every_model_that_generates() -> None:
    found = fits("--gpu", "12GB", "--quantization", "none", "--method", "lora")
    answers = {one["model"]: one for one in found["fits"]}

    assert answers.keys() == {config_file(), "meta-llama/Llama-2-70b-hf"}
    assert answers[config_file()]["fits"] is True
    assert answers["meta-llama/Llama-2-70b-hf"]["peak"] is None
    assert answers["meta-llama/Llama-2-70b-hf"]["fits"] is False


@pytest.mark.usefixtures("catalog")
def test_each_way_lists_what_fits() -> None:
    ran = run(
        "fits", "--gpu", "12GB", "--method", "lora", "--quantization", "none,int8"
    )

    assert ran.code == 0
    assert "LoRA: 1 of 2 models fit:" in ran.out
    assert "LoRA on int8: 1 of 2 models fit:" in ran.out
    assert "batch 1 x 1,024 tokens" in ran.out
    assert "with gradient checkpointing" in ran.out


@pytest.mark.usefixtures("catalog")
@pytest.mark.parametrize(
    "arguments", [("--family", "llama", "--max-params", "1B"), ("--max-params", "2M")]
)
def test_models_are_chosen(arguments: tuple[str, ...]) -> None:
    found = fits("--gpu", "12GB", "--method", "lora", *arguments)

    assert {one["model"] for one in found["fits"]} == {config_file()}


def test_nothing_that_fits_exits_with_1() -> None:
    arguments = (config_file(), "--gpu", "102MB", *SMALL, "--method", "lora")
    found = fits(*arguments)
    ran = run("fits", *arguments)

    assert (found["exit"], ran.code) == (1, 1)
    assert not any(one["fits"] for one in found["fits"])
    assert all(one["margin_bytes"] < 0 for one in found["fits"])
    assert "LoRA" in ran.out


def without_torch(*arguments: str) -> Ran:
    """Runs where torch is not installed and nothing was traced before."""
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom memplan import cli\n"
        f"sys.exit(cli.run({list(arguments)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, text=True
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("estimate", "gpt2"),
        ("fits", "gpt2", "--gpu", "12GB", "--method", "lora"),
        ("fits", "--family", "gpt2", "--gpu", "12GB", "--method", "lora"),
    ],
)
def test_without_torch_it_says_which_extra_to_install(
    arguments: tuple[str, ...],
) -> None:
    """For a recipe so odd that it was not traced ahead for the catalog."""
    odd = ("--attention", "eager", "--dtype", "float32", "--autocast", "float16")
    ran = without_torch(*arguments, *odd)

    assert (ran.code, ran.out) == (2, "")
    assert "pip install 'memplan[torch]'" in ran.err
    assert ran.err.count("\n") == 1


def test_memory_is_kept_back() -> None:
    whole = fits(config_file(), "--gpu", "12GB", "--method", "full")
    kept = fits(config_file(), "--gpu", "12GB", "--method", "full", "--reserve", "1GB")
    desktop = fits(
        config_file(), "--gpu", "12GB", "--method", "full", "--os", "windows"
    )

    margin = whole["fits"][0]["margin_bytes"]
    assert kept["fits"][0]["margin_bytes"] == margin - 10**9
    assert desktop["fits"][0]["margin_bytes"] == margin - 2**30
    assert any("crawls" in note for note in desktop["notes"])


def test_csv_and_markdown_hold_every_answer() -> None:
    arguments = (config_file(), "--gpu", "12GB", "--format")
    rows = list(csv.DictReader(io.StringIO(run("fits", *arguments, "csv").out)))
    lines = run("fits", *arguments, "markdown").out.splitlines()
    answers = fits(config_file(), "--gpu", "12GB")["fits"]

    assert tuple(rows[0]) == COLUMNS
    assert [row["method"] for row in rows] == [one["method"] for one in answers]
    assert [int(row["margin_bytes"]) for row in rows] == [
        one["margin_bytes"] for one in answers
    ]
    assert len(lines) == 2 + len(answers)
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)


def test_lengths_set_the_sequence_and_say_what_is_covered(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text('{"64": 3, "512": 1}')
    arguments = (config_file(), "--gpu", "12GB", "--method", "lora", "--lengths")
    found = fits(*arguments, str(file))
    ran = run("fits", *arguments, str(file))

    assert {one["sequence_length"] for one in found["fits"]} == {512}
    assert found["lengths"]["p50"] == 64
    assert "samples" in ran.out
    assert "100.0%" in ran.out


@pytest.mark.usefixtures("catalog")
def test_texts_need_a_model(tmp_path: Path) -> None:
    file = tmp_path / "texts"
    file.write_text('{"text": "a b c"}')
    ran = run("fits", "--gpu", "12GB", "--lengths", str(file))

    assert (ran.code, ran.out) == (2, "")
    assert "name a MODEL" in ran.err


def test_a_machine_without_a_driver_cannot_be_read() -> None:
    ran = run("fits", "--gpu", "auto")
    if ran.code == 2:
        assert ran.out == ""
        assert "--gpu: 'auto'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--gpu", "is missing", "auto")),
        (("--gpu", "rtx 9999"), ("--gpu", "rtx 9999", "size")),
        (("--gpu", "12GB", "--method", "lorra"), ("method", "'lorra'", "lora")),
        (("--gpu", "12GB", "--quantization", "nf4,nf5"), ("quantization", "'nf5'")),
        (
            ("--gpu", "12GB", "--method", "full", "--quantization", "nf4"),
            ("quantization", "'nf4'", "full"),
        ),
        (("--gpu", "12GB", "--family", "lama"), ("--family", "'lama'", "llama")),
        (("--gpu", "12GB", "--max-params", "1"), ("MODEL", "leaves no model")),
        (("--gpu", "12GB", "--max-params", "big"), ("--max-params", "'big'")),
        (("--gpu", "12GB", "--rank", "0"), ("rank", "0")),
        (
            (config_file(), "--gpu", "V100-32GB", "--quantization", "int8"),
            ("MODEL", "'int8'", "7.5", "nf4-double"),
        ),
        (("--gpu", "12GB", "no-such-model"), ("model", "'no-such-model'")),
    ],
)
def test_bad_input_is_one_clear_sentence(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ran = run("fits", *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.strip().splitlines()) == 1
    for word in words:
        assert word in ran.err
