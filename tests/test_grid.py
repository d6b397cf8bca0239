"""Grids: what stands above holds below, and every combination is a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan import registry
from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.grid import GridRun, read_grid
from memplan.inference import Inference
from memplan.recipe import Recipe
from memplan.store import profiles_path, read_json

GRIDS = sorted((profiles_path() / "grids").glob("*.json"))


def grid(folder: Path, content: Any) -> str:
    file = folder / "grid.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_what_is_nearer_wins_and_values_are_varied(tmp_path: Path) -> None:
    content = {
        "model": "above",
        "recipe": {"rank": 2, "batch_size": 4},
        "runs": [
            {"recipe": {"rank": 8}, "vary": {"quantization": ["none", "nf4"]}},
            {"model": "own", "inference": True, "vary": {}},
        ],
    }

    assert read_grid(grid(tmp_path, content), {"batch_size": 3}) == (
        GridRun(model="above", recipe=Recipe(rank=8, batch_size=3)),
        GridRun(model="above", recipe=Recipe(rank=8, batch_size=3, quantization="nf4")),
        GridRun(
            model="own", recipe=Recipe(rank=2, batch_size=3), inference=Inference()
        ),
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], "list of runs"),
        ({"runs": [1]}, "run 0"),
        ({"runs": [{}]}, "names no model"),
        ({"model": "m", "runs": [{"recpie": {}}]}, "near: recipe"),
        ({"model": "m", "runs": [{"recipe": {"rank": 0}}]}, "rank"),
        ({"model": "m", "runs": [{"vary": {"rnak": [1]}}]}, "near: rank"),
    ],
)
def test_what_is_no_grid_is_refused(tmp_path: Path, content: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        read_grid(grid(tmp_path, content))


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_shipped_grids_are_runs_of_models_that_the_catalog_has(file: Path) -> None:
    asked = {run.get("recipe", {}).get("method") for run in read_json(file)["runs"]}
    missing = asked - {None} - set(registry.names("methods"))
    if missing:
        pytest.skip(f"memplan has no method {missing}")
    runs = read_grid(str(file))

    assert len({str(run) for run in runs}) == len(runs)
    for run in runs:
        assert inspect(run.model).generative


def test_the_seeds_sweeps_are_shipped() -> None:
    assert {file.stem: len(read_json(file)["runs"]) > 0 for file in GRIDS} == {
        "chatglm2-6b": True,
        "llama-2-7b": True,
        "rank-by-type-and-depth": True,
    }
    assert len(read_grid(str(GRIDS[1]))) == 2 + 3 * 5
