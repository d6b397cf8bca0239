"""The committed answers of the planner hold to what the simulation says."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path
from typing import Any

import plan_pairs
import pytest

from memplan.catalog import inspect
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.store import read_json

REPORTS = Path(__file__).parents[1] / "reports"


@pytest.fixture(scope="module")
def against() -> dict[str, Any]:
    pytest.importorskip("torch")
    return runpy.run_path(str(REPORTS / "make_plan_against_defaults.py"))


def test_report_on_pairs_is_made_of_its_rows() -> None:
    rows = plan_pairs.rows()

    text = plan_pairs.REPORT.read_text()

    assert (
        text.partition("\n| | |")[2] == plan_pairs.report(rows).partition("\n| | |")[2]
    )
    with plan_pairs.ROWS.open(newline="") as file:
        assert len(rows) == len([*csv.DictReader(file)]), "each row is of a pair"


def test_committed_answers_were_all_upheld() -> None:
    contradicted = [row for row in plan_pairs.rows() if row["holds"] != "True"]

    text = plan_pairs.REPORT.read_text()

    assert not contradicted or "contradicts" in text
    for row in plan_pairs.rows():
        assert row["answer"] in ("plan", "refusal"), row


@pytest.mark.slow
def test_every_pair_is_answered_so_that_the_simulation_agrees() -> None:
    contradicted = [
        pair for pair in plan_pairs.pairs() if not plan_pairs.answer(pair)["holds"]
    ]

    assert not contradicted


def test_table_of_defaults_is_made_of_its_data(against: dict[str, Any]) -> None:
    rows = read_json(against["DATA"])["rows"]

    text = against["report"](rows)

    assert [(row["model"], row["gpu"]) for row in rows] == [*against["PAIRS"]]
    assert against["REPORT"].read_text() == text
    assert all(f"| {model} | {card} |" in text for model, card in against["PAIRS"][:6])


@pytest.mark.parametrize("name", ["peft, as it is", "plan"])
def test_longest_sequence_of_a_row_fits_and_a_longer_one_does_not(
    name: str, against: dict[str, Any]
) -> None:
    row = read_json(against["DATA"])["rows"][0]
    cell, gpu = row["cells"][name], find_gpu(row["gpu"])
    architecture = inspect(row["model"])
    recipe = Recipe.from_mapping(cell["recipe"])
    longer = cell["longest"] * (1 + 1 / against["TOLERANCE"]) + against["STEP"]

    fits = against["fits"]

    assert fits(architecture, recipe, gpu, cell["longest"])
    assert not fits(architecture, recipe, gpu, int(longer))
