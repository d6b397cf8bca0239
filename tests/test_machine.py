"""What was measured of this machine's cards, and what predictions then use."""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import run
from measured_runs import measured

from memplan import machine
from memplan.commands import doctor
from memplan.errors import InputError, MeasurementError
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.machine import Reading
from memplan.reporters.schema import output_schema
from memplan.units import GIB, MIB

READING = Reading(
    card="NVIDIA GeForce RTX 3060",
    driver="575.57",
    torch=metadata.version("torch"),
    capacity_bytes=11 * GIB,
    context_bytes=131 * MIB,
    measured_at="2026-11-26T10:00:00+00:00",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(machine.ENVIRONMENT, str(tmp_path / "machine"))
    monkeypatch.setattr("memplan.gpu._this_system", lambda: "linux")
    return tmp_path / "machine"


def test_a_reading_is_found_by_its_card_and_the_installed_torch(folder: Path) -> None:
    assert machine.find("GeForce RTX 3060") is None
    machine.keep(READING)
    machine.keep(dataclasses.replace(READING, torch="1.0", context_bytes=1))

    assert machine.find("geforce rtx-3060") == READING
    assert machine.find("RTX 3070") is None
    assert len(list(folder.iterdir())) == 2


def test_the_newest_of_a_card_counts_and_a_broken_file_is_none(folder: Path) -> None:
    newer = dataclasses.replace(
        READING, driver="580.1", measured_at="2026-12-01T00:00:00+00:00"
    )
    machine.keep(newer)
    machine.keep(READING)
    (folder / "broken.json").write_text("{")

    assert machine.find("RTX 3060") == newer


def test_predictions_for_the_card_use_what_was_measured(folder: Path) -> None:
    machine.keep(dataclasses.replace(READING, card="GeForce RTX 3060 12GB"))
    gpu = find_gpu("RTX 3060")

    assert gpu.context_bytes == 131 * MIB
    assert gpu.capacity_bytes == 11 * GIB
    assert "memplan doctor" in gpu.assumptions[0]
    assert not any("planned at" in text for text in gpu.assumptions)


def test_what_is_given_wins_and_other_cards_are_as_before(folder: Path) -> None:
    before = find_gpu("T4")
    machine.keep(dataclasses.replace(READING, card="GeForce RTX 3060 12GB"))

    assert find_gpu("T4") == before
    assert find_gpu("RTX 3060", context_bytes=7).context_bytes == 7
    assert find_gpu("RTX 3060", os_name="windows").context_bytes != 131 * MIB


def test_nothing_is_kept_where_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.ENVIRONMENT, "off")

    assert machine.find("RTX 3060") is None
    with pytest.raises(InputError, match="keeps nothing"):
        machine.keep(READING)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_gpu", lambda text: find_gpu("RTX 3060"))


@pytest.mark.usefixtures("card")
def test_doctor_keeps_what_it_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = measured(
        environment={"torch": "2.13.0", "driver": "575.57"},
        measured_at="2026-11-26T10:00:00+00:00",
    )
    monkeypatch.setattr(doctor, "_measure", lambda progress: told)
    ran = run("doctor", "--json")

    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    jsonschema.validate(printed, output_schema())
    assert printed["machine"]["context_bytes"] == 300 * MIB
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == printed["machine"]
    assert "0.29 GiB" in run("doctor").out


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"outcome": "killed", "message": "died of SIGKILL"}, "SIGKILL"),
        ({"gpu": None, "device": "cpu"}, "nothing was measured"),
        (
            {
                "footprint": Footprint(
                    moments=measured().footprint.moments  # type: ignore[union-attr]
                ),
                "notes": ("NVML does not tell this process's own memory.",),
            },
            "NVML does not tell",
        ),
    ],
)
def test_a_run_that_says_too_little_is_an_error(
    changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(MeasurementError, match=match):
        doctor.reading_of(measured(**changes))


def test_without_a_card_doctor_says_so() -> None:
    ran = run("doctor")

    assert (ran.code, ran.err) == (0, "")
    assert "none was found" in ran.out
    assert "Missing: card" in ran.out
    assert "finds no NVIDIA driver" in ran.out
    printed = json.loads(run("doctor", "--json").out)
    jsonschema.validate(printed, output_schema())
    assert printed["machine"] is None
    assert "card" in printed["missing"]


def test_without_torch_doctor_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "trl"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = run("doctor")

    assert ran.code == 0
    assert "Missing: torch" in ran.out
    assert "pip install 'memplan[torch]'" in ran.out
    assert "pip install trl" in ran.out
