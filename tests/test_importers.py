"""Other people's files as runs: every number where it belongs, nothing guessed."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from memplan import accuracy, importers
from memplan.errors import InputError
from memplan.recipe import Recipe
from memplan.store import profiles_path, read_json
from memplan.units import GIB, MIB
from memplan.validation import Readings, t4_runs

GROUND_TRUTH = profiles_path() / "ground_truth"
SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Optional data of the workplace; tests that need it are skipped without it."""

PHASE = {
    "reserved": 900 * MIB,
    "requested_peak": 600 * MIB,
    "active_peak": 700 * MIB,
    "inactive_split_peak": 10 * MIB,
    "alloc_retries": 0,
    "ooms": 0,
    "seconds": 0.25,
    "allocated_before": 0,
    "reserved_peak": 1000 * MIB,
}
NAMES = ("forward", "backward", "clip", "optimizer", "zero_grad")


def phase(name: str, peak: int, end: int, **changes: int) -> dict[str, Any]:
    sizes = {"allocated_peak": peak * MIB, "allocated": end * MIB}
    return PHASE | {"phase": name} | sizes | changes


RECORD: dict[str, Any] = {
    "case": {
        "id": "llama-3.2-1b--qlora",
        "model": "llama-3.2-1b",
        "config": {"model_type": "llama", "hidden_size": 64},
        "method": "lora",
        "quant": "nf4",
        "double_quant": True,
        "kbit_prepare": True,
        "r": 16,
        "alpha": 16,
        "dropout": 0.05,
        "targets": "all-linear",
        "rank_pattern": None,
        "modules_to_save": None,
        "adapter_fp32": False,
        "dtype": "bf16",
        "autocast": "bf16",
        "batch": 2,
        "seq": 1024,
        "ckpt": True,
        "reentrant": False,
        "attn": "sdpa",
        "optim": "paged_adamw_8bit",
        "clip": 1.0,
        "accum": 2,
        "steps": 3,
        "load": "random",
        "padded": False,
    },
    "status": "ok",
    "losses": [10.5, 10.4],
    "n_params": 1000,
    "n_trainable": 10,
    "phases": [
        phase("load", 800, 400),
        phase("adapt", 500, 450),
        *(phase(f"0.{name}", 600 + i, 500 - i) for i, name in enumerate(NAMES)),
        *(phase(f"1.{name}", 700 + i, 600 - i) for i, name in enumerate(NAMES)),
        *(phase(f"2.{name}", 710 - i, 590 - i) for i, name in enumerate(NAMES)),
    ],
    "final": {"allocated": 450 * MIB, "reserved": 1000 * MIB},
    "driver_used_end": 1500 * MIB,
    "driver_used_before": 400 * MIB,
    "environment": {
        "python": "3.11.9",
        "torch": "2.13.0",
        "alloc_conf": None,
        "gpu": "NVIDIA H100 80GB HBM3",
        "total_memory": 79 * GIB,
        "capability": "9.0",
    },
}


def changed(**case: Any) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    record["case"] |= case
    return record


def with_environment(optimizer: str = "adamw_torch", **changes: Any) -> dict[str, Any]:
    record = changed(optim=optimizer)
    record["environment"] = record["environment"] | changes
    return record


def read_lines(tmp_path: Path, *records: dict[str, Any]) -> importers.Imported:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return importers.read(file)


def test_a_record_of_measure_grid_is_read(tmp_path: Path) -> None:
    (run,) = read_lines(tmp_path, RECORD).runs

    assert run.recipe == Recipe(
        rank=16,
        alpha=16,
        dropout=0.05,
        adapter_dtype="bfloat16",
        autocast="bfloat16",
        quantization="nf4-double",
        optimizer="paged-adamw-8bit",
        max_grad_norm=1.0,
        batch_size=2,
        sequence_length=1024,
        accumulation=2,
        checkpointing="full",
        keep_outputs="none",
    )
    assert run.gpu is not None
    assert (run.card, run.gpu.capacity_bytes) == ("NVIDIA H100 80GB HBM3", 79 * GIB)
    assert run.gpu.compute_capability == (9, 0)
    assert run.step_seconds == (1.25, 1.25, 1.25)
    assert run.config == RECORD["case"]["config"]


def test_steps_of_measure_grid_count_from_zero_and_later_ones_are_one(
    tmp_path: Path,
) -> None:
    """A step's gradients are dropped with the optimizer's moment."""
    (run,) = read_lines(tmp_path, RECORD).runs
    assert run.footprint is not None
    found = {
        moment.label: (
            moment.allocated_bytes // MIB,
            moment.end_allocated_bytes // MIB,
        )
        for moment in run.footprint.moments
    }

    assert found == {
        "load": (800, 400),
        "adapt": (500, 450),
        "1.forward": (600, 500),
        "1.backward": (601, 499),
        "1.clip": (602, 498),
        "1.optimizer": (604, 496),
        "2.forward": (710, 590),
        "2.backward": (709, 589),
        "2.clip": (708, 588),
        "2.optimizer": (707, 586),
    }
    assert run.counters["2.optimizer"]["requested_bytes"] == 600 * MIB


@pytest.mark.parametrize(
    ("optimizer", "fresh", "context"),
    [
        pytest.param("adamw_torch", None, 500 * MIB, id="as older records are"),
        pytest.param("adamw_torch", 400 * MIB, 500 * MIB, id="first case"),
        pytest.param("adamw_torch", 300 * MIB, None, id="later case"),
        pytest.param("paged_adamw_8bit", None, None, id="paged state"),
    ],
)
def test_context_is_what_the_driver_counts_beyond_the_allocator(
    tmp_path: Path, optimizer: str, fresh: int | None, context: int | None
) -> None:
    """Paged state is counted with it, and what earlier cases left likewise."""
    record = with_environment(optimizer, driver_used_context=fresh)
    (run,) = read_lines(tmp_path, record).runs

    assert run.footprint is not None
    assert run.footprint.context_bytes == context


def test_a_run_that_ran_out_of_memory_keeps_what_it_had(tmp_path: Path) -> None:
    record = copy.deepcopy(RECORD)
    record |= {"status": "oom", "error": "CUDA out of memory. Tried to allocate"}
    record["phases"] = record["phases"][:4]

    (run,) = read_lines(tmp_path, record).runs

    assert (run.outcome, run.has_measured) == ("out-of-memory", False)
    assert run.footprint is not None
    assert run.footprint.failed_moment == "1.backward"


def test_what_no_recipe_can_say_is_left_out_with_the_reason(tmp_path: Path) -> None:
    without_card = copy.deepcopy(RECORD)
    del without_card["environment"]["total_memory"]
    found = read_lines(tmp_path, RECORD, changed(method="no-such"), without_card)

    assert len(found.runs) == 1
    reasons = " / ".join(found.left_out)
    assert "no-such" in reasons
    assert "without a card" in reasons


@pytest.mark.skipif(not (SHARED / "gpu").is_dir(), reason="needs the workplace's data")
def test_every_case_of_the_grid_is_a_recipe(tmp_path: Path) -> None:
    """But for methods that memplan does not have."""
    import runpy
    import sys
    from unittest import mock

    grid = tmp_path / "grid.json"
    with mock.patch.object(sys, "argv", ["make_grid.py", str(grid)]):
        runpy.run_path(str(SHARED / "gpu" / "make_grid.py"))
    cases = json.loads(grid.read_text())
    found = read_lines(tmp_path, *(changed(**case) for case in cases))

    assert len(found.runs) + sum(found.left_out.values()) == len(cases) > 90
    assert all("method" in reason for reason in found.left_out)
    assert len({run.id for run in found.runs}) == len(found.runs)


@pytest.mark.skipif(not (SHARED / "gpu").is_dir(), reason="needs the workplace's data")
def test_keys_are_those_that_the_script_writes() -> None:
    source = (SHARED / "gpu" / "measure_grid.py").read_text()

    for key in (*PHASE, "allocated", "allocated_peak", *RECORD["environment"]):
        assert f'"{key}"' in source or f'"{key.removesuffix("_peak")}"' in source, key
    for key in ("driver_used_end", "driver_used_before", "final", "status", "losses"):
        assert f'"{key}"' in source


def test_rows_of_the_t4_are_the_runs_that_are_judged() -> None:
    found = importers.read(GROUND_TRUTH / "t4_runs.json")

    assert not found.left_out
    for run, known in zip(found.runs, t4_runs(), strict=True):
        assert run.recipe == known.recipe
        assert run.footprint is not None
        peak = run.footprint.peak
        assert peak.allocated_bytes == known.readings.allocated_bytes
        assert peak.reserved_bytes == known.readings.reserved_bytes
        assert run.footprint.context_bytes == round(140.875 * MIB)


def test_readings_of_a_run_of_the_t4_are_those_of_its_row() -> None:
    (run, *_) = importers.read(GROUND_TRUTH / "t4_runs.json").runs
    assert run.footprint is not None

    assert Readings.of(run.footprint) == t4_runs()[0].readings


def test_published_rows_are_read_with_their_stand_ins() -> None:
    found = importers.read(GROUND_TRUTH / "published.json")
    rows = read_json(GROUND_TRUTH / "published.json")

    assert len(found.runs) == len(rows) == 24
    for run, row in zip(found.runs, rows, strict=True):
        assert run.recipe == Recipe.from_mapping(
            row["recipe"] | row.get("stand_in", {})
        )
        assert run.footprint is not None
        assert run.footprint.peak.reserved_bytes == 0


@pytest.mark.skipif(
    not (SHARED / "ground_truth").is_dir(), reason="needs the workplace's data"
)
def test_the_table_s_usable_rows_are_those_with_a_recipe() -> None:
    file = SHARED / "ground_truth" / "published.csv"
    found = importers.read(file)
    with file.open() as opened:
        rows = sum(1 for _ in csv.DictReader(opened))

    entries = importers.read(GROUND_TRUTH / "published.json").runs
    assert {run.id for run in found.runs} == {run.id for run in entries}
    assert len(found.runs) + sum(found.left_out.values()) == rows


@pytest.mark.parametrize("text", ['{"a": 1}', "[]", "[1]", "no json", '{"a": 1}\n{'])
def test_files_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)

    with pytest.raises(InputError, match=r"other\.json"):
        importers.read(file)


def test_settings_of_the_allocator_are_named_as_memplan_names_them(
    tmp_path: Path,
) -> None:
    record = with_environment(alloc_conf="max_split_size_mb:64", shared=True)
    (run,) = read_lines(tmp_path, record).runs

    assert run.environment["allocator"] == "max_split_size_mb:64"
    assert accuracy.case_of(run).settings.max_split_size_bytes == 64 * MIB
    assert list(accuracy.predictors_of(run, {})) == ["simulate"]


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    record = changed() | {"losses": [10.5, math.nan, math.inf]}
    (run,) = read_lines(tmp_path, record).runs

    assert run.losses == (10.5,)
