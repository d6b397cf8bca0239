"""Reading the log of a traced fine-tune."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.simulator.events import MARK, EventLog


def events_of(log: EventLog, label: str) -> Iterator[tuple[int, int]]:
    """The events of the first moment of that label, without its mark."""
    start = log.events.index((MARK, log.labels.index(label)))
    for block, num_bytes in log.events[start + 1 :]:
        if block == MARK:
            return
        yield block, num_bytes
