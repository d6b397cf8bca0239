"""Measured runs beside predictions: each reading with its own, and never pooled."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import run as run_command
from measured_runs import CARD, measured, moment

import memplan
from memplan import accuracy, residuals, runs
from memplan.accuracy import (
    Case,
    Comparison,
    Difference,
    compare,
    differences,
    explanations,
    groups_of,
    known_runs,
)
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.reporters import accuracy as reporter
from memplan.reporters.schema import output_schema
from memplan.units import MIB

REPOSITORY = Path(__file__).parents[1]
REPORT = REPOSITORY / "reports" / "accuracy.md"

PREDICTED = Footprint(
    moments=(
        moment("load", 500, 620, 470),
        moment("adapt", 480, 620, 474),
        moment("1.forward", 5000, 6000),
        moment("1.optimizer", 510, 820, 492),
        moment("2.forward", 735, 840, 690),
        moment("2.backward", 756, 861, 500),
        moment("2.optimizer", 510, 861, 490),
    ),
    context_bytes=330 * MIB,
    capacity_bytes=CARD.capacity_bytes,
)


def predict(case: Case) -> Footprint:
    return PREDICTED


def test_peaks_are_those_of_the_steps_that_were_measured() -> None:
    """The first step was not: what it would have taken does not count."""
    compared = compare(measured(), "simulate", predict)

    assert compared.measured == {
        "allocated": 720 * MIB,
        "reserved": 820 * MIB,
        "device": 1120 * MIB,
    }
    assert compared.predicted == {
        "allocated": 756 * MIB,
        "reserved": 861 * MIB,
        "device": (861 + 330) * MIB,
    }
    assert compared.errors["allocated"] == pytest.approx(0.05)
    assert compared.worst == pytest.approx(1191 / 1120 - 1)
    assert compared.predicted_fits is True


def test_readings_that_were_not_taken_are_not_compared() -> None:
    published = Footprint(moments=(moment("training", 5100, 0, 400),))
    compared = compare(measured(footprint=published), "simulate", predict)

    assert compared.measured == {"allocated": 5100 * MIB}
    assert compared.predicted == {"allocated": 5000 * MIB}


def test_a_run_that_ran_out_of_memory_has_a_verdict_alone() -> None:
    compared = compare(measured(outcome="out-of-memory"), "simulate", predict)

    assert compared.errors == {}
    assert compared.predicted_fits is True


def test_a_run_without_steps_cannot_be_compared() -> None:
    loaded = Footprint(moments=(moment("load", 500, 600),))

    with pytest.raises(InputError, match="neither training steps nor answers"):
        compare(measured(footprint=loaded), "simulate", predict)


def test_the_context_is_the_one_that_is_planned_and_not_the_measured() -> None:
    t4 = find_gpu("T4")
    run = measured(gpu=dataclasses.replace(t4, context_bytes=1))
    asked: list[Case] = []

    def note(case: Case) -> Footprint:
        asked.append(case)
        return PREDICTED

    compare(run, "simulate", note)

    assert asked[0].gpu is not None
    assert asked[0].gpu.context_bytes == t4.context_bytes


def runs_of_kinds() -> list[Comparison]:
    kinds = [
        measured("a"),
        measured("b"),
        measured("c", recipe=Recipe(method="full")),
        measured("d", recipe=Recipe(quantization="nf4")),
        measured("e", gpu=dataclasses.replace(CARD, name="Other")),
        measured("f", source="another"),
    ]
    return [compare(run, "simulate", predict) for run in kinds]


def test_groups_are_never_pooled() -> None:
    groups = groups_of(runs_of_kinds())

    assert [len(group.errors) for group in groups] == [1, 1, 2, 1, 1] * 3 or (
        sorted(len(group.errors) for group in groups) == [1] * 12 + [2] * 3
    )
    assert [group.reading for group in groups] == [
        reading for reading in accuracy.READINGS for _ in range(5)
    ]


def test_medians_are_of_sizes_and_the_worst_keeps_its_sign() -> None:
    group = accuracy.Group(
        reading="allocated",
        way="simulate",
        source="s",
        card="c",
        method="m",
        quantization="q",
        errors=(-0.04, 0.01, 0.02),
    )

    assert (group.median, group.bias, group.worst) == (0.02, 0.01, -0.04)


def test_differences_come_by_term_and_moment_the_largest_first() -> None:
    run = measured()
    assert run.footprint is not None
    found = differences(run.footprint, PREDICTED)

    sizes = [abs(each.excess_bytes) for each in found]
    assert sizes == sorted(sizes, reverse=True)
    assert (
        Difference(
            what="weights",
            reading="term",
            measured_bytes=480 * MIB,
            predicted_bytes=470 * MIB,
        )
        in found
    )
    by_name = {(each.what, each.reading): each.excess_bytes // MIB for each in found}
    assert by_name["2.backward", "allocated"] == -36
    assert by_name["adapters", "term"] == -2
    assert by_name["context", "term"] == -30
    assert by_name["cache", "term"] == 100 - (6000 - 5000)


def test_a_whole_step_is_compared_with_all_of_its_phases() -> None:
    whole = Footprint(moments=(moment("2.step", 800, 900),))
    found = {each.reading: each for each in differences(whole, PREDICTED)}

    assert found["allocated"].predicted_bytes == 756 * MIB
    assert found["reserved"].predicted_bytes == 861 * MIB


def test_what_would_explain_a_difference_is_found() -> None:
    """The stand-in's peak grows by 40 MiB where outputs are kept through backward."""

    def by_recipe(case: Case) -> Footprint:
        kept = case.recipe.keep_outputs != "none"
        peak = 680 + 40 * kept + 100 * (case.recipe.attention == "eager")
        return Footprint(moments=(moment("2.backward", peak, 0),))

    run = measured(recipe=Recipe(rank=4, keep_outputs="none"))
    found = explanations(run, by_recipe, lambda label: None)

    assert [each.what for each in found] == [
        "the output, with its logits, was kept through backward",
        "the output was kept until the next step",
    ]
    assert {each.remaining_bytes for each in found} == {0}


def test_a_longer_batch_is_told_by_how_the_peak_grows() -> None:
    def by_length(case: Case) -> Footprint:
        peak = 600 + case.recipe.sequence_length
        return Footprint(moments=(moment("2.backward", peak, 0),))

    run = measured(recipe=Recipe(rank=4, sequence_length=64))
    (found,) = explanations(run, by_length, lambda label: None)

    assert found.what == "the longest sequences had about 120 tokens instead of 64"


def test_errors_of_comparable_runs_are_shown_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "residuals.json"
    accuracy.write_residuals(runs_of_kinds(), file)
    monkeypatch.setattr(residuals, "residuals_file", lambda: file)
    residuals.kept_residuals.cache_clear()
    try:
        found = residuals.comparable_errors(Recipe(), CARD)
        other = residuals.comparable_errors(Recipe(), find_gpu("T4"))
        none = residuals.comparable_errors(Recipe(), None)
    finally:
        residuals.kept_residuals.cache_clear()

    assert found["allocated"] == residuals.Range(least=0.05, most=0.05, count=4)
    assert (other, none) == ({}, {})


def test_simulate_shows_the_errors_of_comparable_runs() -> None:
    ran = run_command(
        *("simulate", "openai-community/gpt2", "--gpu", "T4", "--seq", "64", "--json")
    )
    printed = json.loads(ran.out)

    jsonschema.validate(printed, output_schema())
    assert printed["residuals"]["allocated"]["count"] == 24


def test_the_runs_that_memplan_carries_are_known_without_doubles(
    tmp_path: Path,
) -> None:
    runs.save(measured("own"), tmp_path)
    found = known_runs(tmp_path)

    assert len({run.id for run in found}) == len(found) >= 57 + 24 + 1
    assert "own" in {run.id for run in found}


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        accuracy, "predictors", lambda versions: {"simulate": predict, "other": predict}
    )


@pytest.mark.usefixtures("by_hand")
def test_validate_writes_every_form(tmp_path: Path) -> None:
    runs.save(measured("alpha"), tmp_path / "runs")
    loaded = Footprint(moments=(moment("load", 500, 600),))
    runs.save(measured("loaded", footprint=loaded), tmp_path / "runs")
    files = {
        name: tmp_path / name for name in ("report.md", "picture.svg", "kept.json")
    }
    arguments = ("validate", "--runs", str(tmp_path / "runs"))
    ran = run_command(
        *arguments,
        *("--markdown", str(files["report.md"])),
        *("--figure", str(files["picture.svg"])),
        *("--residuals", str(files["kept.json"])),
    )
    shown = run_command(*arguments)
    printed = json.loads(run_command(*arguments, "--json").out)

    assert (ran.code, ran.out, ran.err) == (0, "", "")
    text = files["report.md"].read_text()
    assert "![Predicted against measured](picture.svg)" in text
    assert "| alpha | simulate | 0.738 / 0.703, +5.00% |" in text
    assert "* loaded: " in text
    assert files["picture.svg"].read_text().startswith("<?xml")
    assert len(json.loads(files["kept.json"].read_text())) == 2
    assert "Left out: loaded" in shown.out
    jsonschema.validate(printed, output_schema())
    assert [row["way"] for row in printed["runs"]] == ["simulate", "other"]


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("option", ["--figure", "--markdown", "--residuals"])
def test_files_that_cannot_be_written_are_named(option: str, tmp_path: Path) -> None:
    runs.save(measured("alpha"), tmp_path / "runs")
    ran = run_command(
        "validate", "--runs", str(tmp_path / "runs"), option, str(tmp_path / "no" / "f")
    )

    assert (ran.code, ran.out) == (2, "")


@pytest.mark.usefixtures("by_hand")
def test_explain_shows_a_run_by_name_or_file(tmp_path: Path) -> None:
    file = runs.save(measured("alpha"), tmp_path)
    by_name = run_command("explain", "alp", "--runs", str(tmp_path))
    by_file = run_command("explain", str(file))
    printed = json.loads(
        run_command("explain", str(file), "--json").out.split("\n}\n")[0] + "}"
    )

    assert by_name.code == 0
    assert by_name.out == by_file.out
    assert "2.backward" in by_name.out
    jsonschema.validate(printed, output_schema())
    assert [way["way"] for way in printed["ways"]] == ["simulate", "other"]


def test_explain_refuses_an_unknown_run(tmp_path: Path) -> None:
    ran = run_command("explain", "no-such-run", "--runs", str(tmp_path))

    assert (ran.code, ran.out) == (2, "")


def between_marks(text: str) -> list[str]:
    begin, end = reporter.README_MARKS
    return text.partition(begin)[2].partition(end)[0].strip().splitlines()


def table_of(report: str) -> list[str]:
    lines = report.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| reading"))
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    return lines[first:last]


FEWEST_RUNS = 3
"""Groups of fewer runs are in the report alone, as the estimate's are."""


def in_readme(row: str) -> bool:
    cells = [cell.strip() for cell in row.split("|")]
    return cells[2] == "simulate" and int(cells[7]) >= FEWEST_RUNS


def test_readme_shows_the_errors_that_validate_found() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    head, rule, *rows = table_of(REPORT.read_text(encoding="utf-8"))

    assert between_marks(readme) == [head, rule, *filter(in_readme, rows)]


def test_the_residuals_are_those_of_the_report() -> None:
    counts: dict[str, int] = {}
    for row in json.loads(residuals.residuals_file().read_text()):
        for reading in row["errors"]:
            counts[reading] = counts.get(reading, 0) + 1
    told = [line.split("|")[1:8] for line in table_of(REPORT.read_text())[2:]]

    for reading, count in counts.items():
        assert count == sum(int(c[6]) for c in told if c[0].strip() == reading)


@pytest.mark.slow
def test_committed_report_is_what_validate_finds(tmp_path: Path) -> None:
    report, kept = tmp_path / "accuracy.md", tmp_path / "residuals.json"
    figure = tmp_path / "accuracy.svg"
    ran: Any = run_command(
        *("validate", "--markdown", str(report), "--figure", str(figure)),
        *("--residuals", str(kept)),
    )

    assert ran.code == 0
    assert report.read_text() == REPORT.read_text()
    assert kept.read_text() == residuals.residuals_file().read_text()


def test_without_torch_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = next(run for run in accuracy.known_runs(tmp_path) if run.gpu)
    runs.save(one, tmp_path)
    monkeypatch.setenv("MEMPLAN_CACHE", "off")
    monkeypatch.delattr(memplan, "simulator", raising=False)
    monkeypatch.setitem(sys.modules, "memplan.simulator", None)
    report = tmp_path / "report.md"
    ran = run_command("validate", "--runs", str(tmp_path), "--markdown", str(report))

    assert (ran.code, ran.out) == (2, "")
    assert "pip install 'memplan[torch]'" in ran.err
    assert not report.exists()
