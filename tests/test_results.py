"""What was simulated before is found again, and only that."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import pytest
from command_line import run

from memplan import results
from memplan.footprint import Footprint, Moment
from memplan.simulation import LiveBlock, Simulation

SIMULATION = Simulation(
    footprint=Footprint(
        moments=(
            Moment(label="load", allocated_bytes=10, reserved_bytes=20),
            Moment(
                label="1.forward",
                allocated_bytes=30,
                reserved_bytes=40,
                end_allocated_bytes=25,
                breakdown={"weights": 10, "activations": 20},
            ),
        ),
        context_bytes=5,
        capacity_bytes=100,
        notes=("a note",),
    ),
    total_parameters=7,
    trainable_parameters=3,
    peak_blocks=(
        LiveBlock(num_bytes=20, category="activations", operator="mm", module="a.b"),
    ),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(results.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache" / "simulations"


def test_what_is_kept_comes_back_equal(cache: Path) -> None:
    assert results.load("name") is None
    results.keep("name", SIMULATION)
    assert results.load("name") == SIMULATION


@pytest.mark.parametrize("text", ["", "{", "[]", '{"footprint": {}}'])
def test_a_broken_file_counts_as_missing(cache: Path, text: str) -> None:
    results.keep("name", SIMULATION)
    (cache / "name.json").write_text(text)
    assert results.load("name") is None


def test_keys_tell_inputs_and_versions_apart() -> None:
    keys = {
        results.key({"rank": 4}, {"torch": "1"}),
        results.key({"rank": 8}, {"torch": "1"}),
        results.key({"rank": 4}, {"torch": "2"}),
    }
    assert len(keys) == 3
    one = results.key({"a": 1, "b": 2}, {})
    assert one == results.key({"b": 2, "a": 1}, {})


def test_off_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(results.ENVIRONMENT, "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results.keep("name", SIMULATION)
    assert results.load("name") is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(results.ENVIRONMENT, str(blocked / "cache"))
    results.keep("name", SIMULATION)
    assert results.load("name") is None


def write_often(number: int) -> None:
    simulation = dataclasses.replace(SIMULATION, total_parameters=number)
    for _ in range(50):
        results.keep("name", simulation)


def test_two_processes_may_write(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(n,)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    seen = [results.load("name") for _ in range(200)]
    for writer in writers:
        writer.join()

    final = results.load("name")
    assert final is not None
    for found in (*filter(None, seen), final):
        assert dataclasses.replace(found, total_parameters=7) == SIMULATION
    assert [file.name for file in cache.iterdir()] == ["name.json"]


def test_a_command_that_was_run_needs_no_torch_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("simulate", "EleutherAI/pythia-70m", "--rank", "4", "--json")
    first = run(*arguments)
    assert first.code == 0
    assert len(list(cache.iterdir())) == 1

    monkeypatch.setattr("memplan.commands.simulate.import_simulator", pytest.fail)
    assert run(*arguments).out == first.out
