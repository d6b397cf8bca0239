"""The allocator's model does what torch's did on an H100, block for block."""

from __future__ import annotations

from pathlib import Path

import pytest

from memplan import accuracy, runs
from memplan.accuracy import Case
from memplan.footprint import Footprint
from tests import histories, histories_report

QUICK_BYTES = 200_000
"""A history that is larger than this is replayed with the slow tests."""

FILES = histories.files()
WHOLE = [file for file in FILES if "expandable" not in file.name]
EXPANDABLE = [file for file in FILES if "expandable" in file.name]


def each(files: list[Path]) -> list[object]:
    return [
        pytest.param(
            file,
            id=histories.name_of(file),
            marks=[pytest.mark.slow] * (file.stat().st_size > QUICK_BYTES),
        )
        for file in files
    ]


def case_of(file: Path) -> Case:
    return accuracy.case_of(runs.read(histories.run_file(file)))


def measured(file: Path) -> Footprint:
    footprint = runs.read(histories.run_file(file)).footprint
    assert footprint is not None
    return footprint


@pytest.mark.parametrize("file", each(WHOLE))
def test_every_block_lies_where_the_card_had_it(file: Path) -> None:
    events = histories.read(file)

    found = histories.replay_on_its_segments(events, case_of(file))

    assert found.num_blocks > 5000
    asked = sum(action == "alloc" for action, *_ in events)
    assert found.num_blocks + found.num_older == asked
    assert found.num_older < found.num_blocks / 3
    if found.num_older == 0:
        moments = measured(file).moments
        peak = max(moment.allocated_bytes for moment in moments)
        assert found.peak_allocated_bytes == peak
        assert found.peak_reserved_bytes == max(m.reserved_bytes for m in moments)


@pytest.mark.parametrize("file", each(EXPANDABLE))
def test_expandable_segments_grow_as_on_the_card(file: Path) -> None:
    events = histories.read(file)

    found = histories.allocator_of(case_of(file))
    histories.replay(events, found)

    mapped = peak = 0
    for action, _, size in events:
        mapped += {"segment_map": size, "segment_unmap": -size}.get(action, 0)
        peak = max(peak, mapped)
    assert found.peak_reserved_bytes == pytest.approx(peak, abs=4 * 2**20)
    assert found.reserved_bytes == pytest.approx(mapped, abs=4 * 2**20)


EXACT = (
    "olmo-2-1b-qlora-r16-b1-s1024",
    "gemma-3-1b-qlora-r16-b1-s1024",
    "llama-3.2-1b-qlora-r16-b2-s1024-noautocast-nockpt",
    "llama-2-7b-qlora-r16-b1-s2048",
)
"""Runs whose reserved peak is 5 to 10 % from what their own load leaves."""


@pytest.mark.parametrize("name", EXACT)
def test_after_the_measured_load_the_simulated_steps_reserve_the_same(
    name: str,
) -> None:
    files = [file for file in FILES if histories.name_of(file) == name]
    if not files:
        pytest.skip("the histories are not here")

    found = histories_report.compare(files[0])

    assert abs(found.reserved) > 0.05
    assert abs(found.allocated_after_load) < 1e-4
    assert abs(found.reserved_after_load) < 1e-4


@pytest.mark.slow
def test_the_committed_page_is_what_the_histories_say() -> None:
    assert histories_report.REPORT.read_text() == histories_report.report()
