"""Simulated steps after the load that was measured; writes reports/histories_h100.md.

What a load leaves in the allocator's cache moves what is reserved later. Where the
requests of the load are those that the card had, and the steps are the simulation's,
what differs still is the steps' own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from memplan import runs
from memplan.accuracy import Case, case_of
from memplan.allocator import Block, CachingAllocator
from memplan.footprint import Footprint
from memplan.profile import Profile
from memplan.simulator import simulation_of, trace
from memplan.simulator.events import EMPTY_CACHE, FREE, MARK, EventLog
from tests import histories
from tests.histories import Event

REPORT = Path(__file__).parents[1] / "reports" / "histories_h100.md"

ID_BYTES = 8
"""A token's number."""

ROUNDING_BYTES = 4 * 2**20
"""By how much what is held when the steps begin may differ from the record, which
counts what earlier runs of the process left."""


@dataclass(frozen=True, slots=True)
class AfterLoad:
    """How far the steps of a run are from what was measured, as shares."""

    run: Profile
    allocated: float
    """The prediction's error of the allocated peak."""
    reserved: float
    allocated_after_load: float
    """The same where the load's requests are the measured ones."""
    reserved_after_load: float


def compare(file: Path) -> AfterLoad:
    """A run with a history beside its simulation, after its own load and the card's."""
    run = runs.read(histories.run_file(file))
    case = case_of(run)
    measured = _step_peaks(run.footprint)
    traced = trace(case.architecture, case.recipe, case.gpu)
    whole = simulation_of(
        traced, case.gpu, case.settings, notes=(), host={}, record=None, advises=False
    )
    predicted = _step_peaks(whole.footprint)
    mixed = _after_load(histories.read(file), traced.log, run, case)
    return AfterLoad(
        run,
        predicted[0] / measured[0] - 1,
        predicted[1] / measured[1] - 1,
        mixed[0] / measured[0] - 1,
        mixed[1] / measured[1] - 1,
    )


def _step_peaks(footprint: Footprint | None) -> tuple[int, int]:
    assert footprint is not None
    steps = [moment for moment in footprint.moments if moment.label[0] in "12"]
    return (
        max(moment.allocated_bytes for moment in steps),
        max(moment.reserved_bytes for moment in steps),
    )


def _after_load(
    events: list[Event], log: EventLog, run: Profile, case: Case
) -> tuple[int, int]:
    """Peaks of the log's steps in an allocator that has had the measured load."""
    allocator = histories.allocator_of(case)
    held = histories.replay(events[: _end_of_load(events, run)], allocator)
    allocator.reset_peak_stats()
    by_size: dict[int, list[Block]] = defaultdict(list)
    for older in held.values():
        if older is not None:
            by_size[older.requested_bytes].append(older)
    live: dict[int, Block | None] = {}
    in_steps = False
    for block, num_bytes in log.events:
        if block == MARK:
            in_steps = log.labels[num_bytes][0] in "12"
        elif not in_steps:
            continue
        elif block == EMPTY_CACHE:
            allocator.empty_cache()
        elif num_bytes != FREE:
            live[block] = allocator.malloc(num_bytes)
        elif block in live:
            allocator.free(live.pop(block))
        elif by_size[log.sizes[block]]:
            allocator.free(by_size[log.sizes[block]].pop())
    return allocator.peak_allocated_bytes, allocator.peak_reserved_bytes


def _end_of_load(events: list[Event], run: Profile) -> int:
    """The event that makes the first batch, when so much is held as once adapted."""
    assert run.footprint is not None
    adapted = next(m for m in run.footprint.moments if m.label == "adapt")
    batch_bytes = run.recipe.batch_size * run.recipe.sequence_length * ID_BYTES
    allocator = CachingAllocator()
    for number, (action, _, size) in histories.advance(events, allocator, {}):
        if action == "alloc" and size == batch_bytes:
            missing = allocator.allocated_bytes - adapted.end_allocated_bytes
            if abs(missing) <= ROUNDING_BYTES:
                return number
    raise AssertionError(f"{run.id} has no first batch")


def report() -> str:
    """The page, a row for each run of training that has a history."""
    rows = [compare(file) for file in training_files()]
    rows.sort(key=lambda row: -abs(row.reserved))
    return _HEAD + "".join(f"{_row(row)}\n" for row in rows) + _TAIL


def _row(row: AfterLoad) -> str:
    errors = (
        row.allocated,
        row.reserved,
        row.allocated_after_load,
        row.reserved_after_load,
    )
    cells = " | ".join(f"{error:+.2%}" for error in errors)
    return f"| {row.run.id} | {cells} |"


def training_files() -> list[Path]:
    """Histories of runs that trained to their end."""
    return [
        file
        for file in histories.files()
        if runs.read(histories.run_file(file)).outcome == "ok"
    ]


_HEAD = """\
# What an H100's allocator did, and the simulation after the same load

`python -m tests.histories_report` writes this page from the runs and histories of one
H100 in `profiles`; `tests/test_histories.py` holds what it says.

**The allocator.** 239 histories were replayed through memplan's model of torch's
allocator, which was told where the driver put each segment: in all of them every block
lies where the card had it, and every segment has its size. Of the eight with expandable
segments, those below map the same pages. 39 of the histories are kept.

**The steps.** What a load leaves in the allocator's cache, and the addresses that a
process used before, decide which holes the steps find. The campaign's loop draws its
weights on the card, one by one, where memplan simulates `from_pretrained`, which puts
them into one block. So the first pair of columns is a prediction as it is asked for,
and the second pair gives the simulated steps an allocator that has had the requests of
the measured load: what differs there is the steps' own. Both are of the worst moment of
the steps, predicted less measured.

| run | allocated | reserved | allocated after the load | reserved after the load |
| --- | --: | --: | --: | --: |
"""

_TAIL = """
Where `from_pretrained` loaded (`pretrained`), there is nothing to put right. What is
left, row by row:

* `llama-3.2-1b-int8-r16-b2-s1024-pretrained` keeps 88 MiB that the simulation lacks:
  the columns of activations beyond LLM.int8's threshold of 6, which are kept and
  multiplied in 16 bits. How many there are depends on the values; the weights that
  transformers draws make some, those of the campaign's loop none.
* `tinyllama-1.1b-full-bf16-b2-s1024-sgd` ran after other cases of its process, whose
  addresses moved a hole: measured in a process of its own (`fresh`) it is exact.
* `llama-3.2-1b-qlora-r16-b2-s1024-noautocast-nockpt-pretrained` came after the model
  whose checkpoint it loads: the process had made that on the card and freed it.
* Rows of 0.2 % and less: biases that bitsandbytes casts in place, and blocks of the
  process's earlier cases, which end in other places here.
"""


if __name__ == "__main__":
    REPORT.write_text(report(), encoding="utf-8")
