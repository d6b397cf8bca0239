"""The log of a fine-tune, replayed through the allocator: moments with their peaks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from memplan.allocator import AllocatorSettings, CachingAllocator, OutOfMemory
from memplan.footprint import Moment
from memplan.simulator.events import EMPTY_CACHE, FREE, MARK, EventLog


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A block that was live at the peak."""

    num_bytes: int
    category: str
    operator: str
    module: str


@dataclass(slots=True)
class Replay:
    """What the replay found."""

    moments: list[Moment] = field(default_factory=list)
    failed_moment: str | None = None
    missing_bytes: int = 0
    peak_blocks: tuple[int, ...] = ()
    """Blocks live at the allocated peak of the training steps."""
    num_alloc_retries: int = 0


def replay(
    log: EventLog,
    settings: AllocatorSettings,
    capacity_bytes: int | None,
) -> Replay:
    """Moments of the log under an allocator that may reserve `capacity_bytes`.

    Stops at the first allocation that does not fit.
    """
    return _Replayer(log, CachingAllocator(settings, capacity_bytes)).run()


class _Replayer:
    def __init__(self, log: EventLog, allocator: CachingAllocator) -> None:
        self._log = log
        self._allocator = allocator
        self._live: dict[int, Any] = {}
        self._result = Replay()
        self._label = ""
        self._peak_bytes = 0
        self._at_peak: dict[str, tuple[int, tuple[int, ...]]] = {}

    def run(self) -> Replay:
        peaks = _peak_positions(self._log)
        try:
            self._run(peaks)
        except OutOfMemory as failure:
            self._end_moment()
            self._result.failed_moment = self._label
            self._result.missing_bytes = _missing(failure)
        else:
            self._end_moment()
        self._result.num_alloc_retries = self._allocator.num_alloc_retries
        return self._result

    def _run(self, peaks: dict[int, int]) -> None:
        live, malloc, free = self._live, self._allocator.malloc, self._allocator.free
        for position, (block, num_bytes) in enumerate(self._log.events):
            if num_bytes == FREE:
                free(live.pop(block))
            elif block >= 0:
                live[block] = malloc(num_bytes)
            elif block == MARK:
                self._end_moment()
                self._label = self._log.labels[num_bytes]
                self._allocator.reset_peak_stats()
            elif block == EMPTY_CACHE:
                self._allocator.empty_cache()
            if position in peaks:
                self._note_peak()

    def _note_peak(self) -> None:
        """Keeps what is live when the moment's allocated peak is reached."""
        self._at_peak[self._label] = (
            self._allocator.allocated_bytes,
            tuple(self._live),
        )

    def _end_moment(self) -> None:
        if not self._label:
            return
        blocks = self._at_peak.get(self._label, (0, tuple(self._live)))[1]
        allocated = self._allocator.peak_allocated_bytes
        moment = Moment(
            label=self._label,
            allocated_bytes=allocated,
            reserved_bytes=self._allocator.peak_reserved_bytes,
            end_allocated_bytes=self._allocator.allocated_bytes,
            breakdown=self._breakdown(blocks, allocated),
        )
        self._merge(moment, blocks)

    def _merge(self, moment: Moment, blocks: tuple[int, ...]) -> None:
        """A moment that comes again, as micro-batches do, keeps its worst."""
        moments = self._result.moments
        same = [m for m in moments if m.label == moment.label]
        if same:
            moment = _worse(same[0], moment)
            moments[moments.index(same[0])] = moment
        else:
            moments.append(moment)
        if moment.in_training and moment.allocated_bytes > self._peak_bytes:
            self._peak_bytes = moment.allocated_bytes
            self._result.peak_blocks = blocks

    def _breakdown(self, blocks: tuple[int, ...], allocated: int) -> dict[str, int]:
        """Allocated bytes by category; rounding goes to where the bytes are."""
        parts: Counter[str] = Counter()
        for block in blocks:
            held = self._live.get(block)
            size = held.size_bytes if held is not None else self._log.sizes[block]
            parts[self._log.categories[block]] += size
        parts["activations"] += allocated - sum(parts.values())
        return dict(parts)


def _peak_positions(log: EventLog) -> dict[int, int]:
    """For each stretch between marks, the event after which most bytes were asked for."""
    peaks: dict[int, int] = {}
    sizes, total, best, best_position = log.sizes, 0, -1, -1
    for position, (block, num_bytes) in enumerate(log.events):
        if num_bytes == FREE:
            total -= sizes[block]
        elif block >= 0:
            total += num_bytes
            if total > best:
                best, best_position = total, position
        elif block == MARK:
            peaks[best_position] = best
            best, best_position = -1, -1
    peaks[best_position] = best
    return peaks


def _missing(failure: OutOfMemory) -> int:
    return max(
        1, failure.requested_bytes + failure.allocated_bytes - (failure.capacity_bytes or 0)
    )


def _worse(one: Moment, other: Moment) -> Moment:
    worse = max(one, other, key=lambda moment: moment.allocated_bytes)
    return dataclasses.replace(
        worse,
        reserved_bytes=max(one.reserved_bytes, other.reserved_bytes),
        end_allocated_bytes=other.end_allocated_bytes,
    )
