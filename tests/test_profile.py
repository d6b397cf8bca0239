"""A measured run as a record: whole, of a known version, and read back as written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from measured_runs import measured

from memplan import runs
from memplan.errors import InputError, MemplanError, UnknownNameError
from memplan.profile import Profile, slug
from memplan.reporters.schema import profile_schema


def whole(**changes: Any) -> dict[str, Any]:
    return measured().to_json() | changes


def test_a_record_is_read_back_as_it_was_written() -> None:
    run = measured()

    assert Profile.from_json(json.loads(json.dumps(run.to_json()))) == run


@pytest.mark.parametrize(
    "run",
    [
        measured(),
        measured(gpu=None, device="cpu"),
        measured(footprint=None, outcome="killed", message="signal 9"),
        measured(config={"model_type": "gpt2"}),
    ],
)
def test_records_hold_to_the_schema(run: Profile) -> None:
    jsonschema.validate(json.loads(json.dumps(run.to_json())), profile_schema())


LATER = {"inference", "answer"}
"""Keys that older records lack."""


@pytest.mark.parametrize("key", sorted(measured().to_json().keys() - LATER))
def test_a_record_without_a_key_is_refused(key: str) -> None:
    record = whole()
    del record[key]

    with pytest.raises(MemplanError, match=r"one\.json"):
        Profile.from_json(record, "one.json")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, profile_schema())


def test_a_record_that_knows_of_no_answers_is_of_training() -> None:
    record = whole()
    del record["inference"], record["answer"]

    read = Profile.from_json(record, "one.json")
    assert read.inference is None
    assert read.answer == {}
    jsonschema.validate(record, profile_schema())


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match="schema 99"):
        Profile.from_json(whole(schema=99))


@pytest.mark.parametrize("change", [{"device": "tpu"}, {"outcome": "fine"}])
def test_unknown_devices_and_outcomes_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(InputError, match="use one of"):
        dataclasses.replace(measured(), **change)


def test_runs_are_kept_by_card_and_found_by_the_beginning_of_their_names(
    tmp_path: Path,
) -> None:
    for name in ("alpha-1", "alpha-2", "beta"):
        runs.save(measured(name), tmp_path)
    runs.save(measured("gamma", gpu=None, device="cpu"), tmp_path)
    found = runs.load(tmp_path)

    assert [run.id for run in found] == ["gamma", "alpha-1", "alpha-2", "beta"]
    assert (tmp_path / "nvidia-test-card" / "beta.json").is_file()
    assert runs.find(found, "bet").id == "beta"
    assert runs.find(found, "alpha-2").id == "alpha-2"
    with pytest.raises(InputError, match="alpha-1, alpha-2"):
        runs.find(found, "alpha")
    with pytest.raises(UnknownNameError, match="near: beta"):
        runs.find(found, "betta")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "broken.json").write_text('{"kind": "profile"')

    with pytest.raises(InputError, match=r"broken\.json"):
        runs.load(tmp_path)


def test_what_a_killed_writer_left_is_no_run_and_is_swept_away(tmp_path: Path) -> None:
    file = runs.save(measured(), tmp_path)
    half = file.with_name(f".{file.name}.0123456789ab.tmp")
    half.write_text('{"kind"')

    assert [run.id for run in runs.load(tmp_path)] == ["one"]
    runs.prepare(tmp_path)
    assert not half.exists()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["one.json"]


def test_a_full_disk_is_said_and_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = runs.save(measured(), tmp_path)
    before = file.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device"):
        runs.save(measured(message="new"), tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce RTX 3060", "nvidia-geforce-rtx-3060"),
        ("../../etc/passwd", "etc-passwd"),
        ("Qwen/Qwen2.5-0.5B", "qwen-qwen2.5-0.5b"),
        ("...", "unnamed"),
    ],
)
def test_names_become_names_of_files(name: str, expected: str) -> None:
    assert slug(name) == expected
