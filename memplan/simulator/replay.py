"""The log of a fine-tune, replayed through the allocator: moments with their peaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from memplan.allocator import AllocatorSettings, CachingAllocator, OutOfMemory
from memplan.footprint import Moment
from memplan.simulation import LiveBlock, Sample
from memplan.simulator.events import EMPTY_CACHE, FREE, MARK, EventLog

_Blocks = list[tuple[int, int]]
"""Blocks of a log, with the bytes that the allocator took for them."""


@dataclass(slots=True)
class Replay:
    """What the replay found."""

    moments: list[Moment] = field(default_factory=list)
    failed_moment: str | None = None
    peak_blocks: tuple[LiveBlock, ...] = ()
    """Blocks live at the allocated peak of the training steps, or of generation, the
    newest last."""
    num_alloc_retries: int = 0


def replay(
    log: EventLog,
    settings: AllocatorSettings,
    capacity_bytes: int | None,
    device_bytes: int | None = None,
) -> Replay:
    """Moments of the log under an allocator that may reserve `capacity_bytes`.

    Stops at the first allocation that does not fit. `device_bytes` is the card's whole
    memory, of which settings may allow the process a share.
    """
    allocator = CachingAllocator(settings, capacity_bytes, device_bytes=device_bytes)
    return _Replayer(log, allocator).run()


def samples(
    log: EventLog,
    settings: AllocatorSettings,
    capacity_bytes: int | None,
    device_bytes: int | None = None,
) -> Iterator[Sample]:
    """Memory after every event of a log that fits into `capacity_bytes`."""
    allocator = CachingAllocator(settings, capacity_bytes, device_bytes=device_bytes)
    live: dict[int, Any] = {}
    moment, index = "", 0
    for block, num_bytes in log.events:
        if block == MARK:
            moment = log.labels[num_bytes]
            continue
        if block == EMPTY_CACHE:
            allocator.empty_cache()
        elif num_bytes == FREE:
            allocator.free(live.pop(block))
        else:
            live[block] = allocator.malloc(num_bytes)
        yield Sample(
            index=index,
            moment=moment,
            allocated_bytes=allocator.allocated_bytes,
            reserved_bytes=allocator.reserved_bytes,
            operator=log.operators[block] if block >= 0 else "empty_cache",
            module=log.modules[block] if block >= 0 else "",
            category=log.categories[block] if block >= 0 else "",
        )
        index += 1


class _Replayer:
    """Walks a log once, with the allocator and the moment it is in."""

    def __init__(self, log: EventLog, allocator: CachingAllocator) -> None:
        self._log = log
        self._allocator = allocator
        self._live: dict[int, Any] = {}
        self._result = Replay()
        self._label = ""
        self._peak_bytes = 0
        self._peak_blocks: _Blocks = []
        self._at_peak: _Blocks = []

    def run(self) -> Replay:
        try:
            self._run()
        except OutOfMemory:
            self._result.failed_moment = self._label
        self._end_moment()
        self._result.peak_blocks = tuple(self._told(self._peak_blocks))
        self._result.num_alloc_retries = self._allocator.num_alloc_retries
        return self._result

    def _run(self) -> None:
        peaks = _peak_positions(self._log)
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
                self._at_peak = self._live_blocks()

    def _live_blocks(self) -> _Blocks:
        return [
            (block, held.size_bytes)
            for block, held in self._live.items()
            if held is not None
        ]

    def _told(self, blocks: _Blocks) -> Iterator[LiveBlock]:
        log = self._log
        for block, num_bytes in blocks:
            yield LiveBlock(
                num_bytes=num_bytes,
                category=log.categories[block],
                operator=log.operators[block],
                module=log.modules[block],
            )

    def _breakdown(self, blocks: _Blocks, allocated: int) -> dict[str, int]:
        """Allocated bytes by category.

        The peak is looked for by bytes asked for; what rounding moves it by is counted
        as activations, which come and go.
        """
        parts: Counter[str] = Counter()
        for block, num_bytes in blocks:
            parts[self._log.categories[block]] += num_bytes
        parts["activations"] += allocated - sum(parts.values())
        return dict(parts)

    def _end_moment(self) -> None:
        if not self._label:
            return
        allocated = self._allocator.peak_allocated_bytes
        moment = Moment(
            label=self._label,
            allocated_bytes=allocated,
            reserved_bytes=self._allocator.peak_reserved_bytes,
            end_allocated_bytes=self._allocator.allocated_bytes,
            breakdown=self._breakdown(self._at_peak or self._live_blocks(), allocated),
        )
        if moment.counts and allocated > self._peak_bytes:
            self._peak_bytes = allocated
            self._peak_blocks = self._at_peak
        self._merge(moment)
        self._at_peak = []

    def _merge(self, moment: Moment) -> None:
        """A moment that comes again, as micro-batches do, keeps its worst."""
        moments = self._result.moments
        for index, same in enumerate(moments):
            if same.label == moment.label:
                moments[index] = same.merged(moment)
                return
        moments.append(moment)


def _peak_positions(log: EventLog) -> dict[int, int]:
    """For each stretch between marks, the event after which most bytes are live."""
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
