"""The paired comparison of ranks runs, at a small size, and is paired."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import benchmark_ranks as benchmark

from memplan.planner.ranks import DEFAULT_PRIOR

SIZE = benchmark.Size(
    pretraining_steps=3, tuning_steps=2, seeds=2, batch=2, sequence=32, evaluated=4
)
EQUAL = "prior per-parameter =B8"
ONLY = (benchmark.FOUND_FIRST, EQUAL, "random =B8", "uniform r=4")


@pytest.fixture(scope="module")
def rows() -> dict[str, benchmark.Row]:
    return {row.name: row for row in benchmark.compare(SIZE, ONLY)}


def test_equal_ranks_are_the_same_run(rows: dict[str, benchmark.Row]) -> None:
    assert rows[EQUAL].differences == (0.0, 0.0)
    assert rows[EQUAL].verdict == "no difference shown"


def test_allocations_are_of_equal_bytes(rows: dict[str, benchmark.Row]) -> None:
    reference = rows[benchmark.FOUND_FIRST].parameters

    assert 0.98 * reference <= rows["random =B8"].parameters <= reference
    assert rows["uniform r=4"].parameters == reference / 2


def test_report_says_what_each_allocation_came_to(
    rows: dict[str, benchmark.Row],
) -> None:
    text = benchmark.report([*rows.values()], SIZE, 1.0)

    for name in ONLY:
        assert f"| {name} |" in text
    assert "no difference shown: prior per-parameter" in text


def test_default_prior_is_what_the_committed_table_leads_to() -> None:
    text = benchmark.REPORT.read_text()
    cells = [line.split("|")[1:6] for line in text.splitlines() if "=B8 |" in line]
    cells += [
        line.split("|")[1:6] for line in text.splitlines() if "uniform r=" in line
    ]
    found = {
        name.strip(): (float(mean), float(half.replace("±", "").strip() or 0))
        for name, _, _, mean, half in cells
    }

    assert benchmark.default_prior(found) == DEFAULT_PRIOR
    assert benchmark.decision(found) in text


def test_material_gain_would_change_the_default() -> None:
    found = {
        "uniform r=4": (0.04, 0.01),
        EQUAL: (0.0, 0.0),
        "prior mlp-first =B8": (-0.0055, 0.003),
    }

    assert benchmark.default_prior(found) == "per-parameter"
    found["prior mlp-first =B8"] = (-0.0055, 0.001)
    assert benchmark.default_prior(found) == "mlp-first"


def test_committed_table_has_every_allocation() -> None:
    text = benchmark.REPORT.read_text()

    for name in benchmark.priors.names():
        assert f"| prior {name} =B8 |" in text
