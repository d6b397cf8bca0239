"""Reading the log of a traced fine-tune."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.simulator.events import FREE, MARK, EventLog


def events_of(log: EventLog, label: str) -> Iterator[tuple[int, int]]:
    """The events of the first moment of that label, without its mark."""
    start = log.events.index((MARK, log.labels.index(label)))
    for block, num_bytes in log.events[start + 1 :]:
        if block == MARK:
            return
        yield block, num_bytes


def live_bytes(log: EventLog) -> int:
    """Bytes that are allocated after a log's last event."""
    live: dict[int, int] = {}
    for block, num_bytes in log.events:
        if block >= 0 and num_bytes == FREE:
            del live[block]
        elif block >= 0:
            live[block] = num_bytes
    return sum(live.values())
