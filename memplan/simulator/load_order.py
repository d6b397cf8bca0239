"""Other orders in which the events of a traced load may come.

Loading threads put 16-bit weights on the card while earlier ones are still being
quantised (transformers 5.0, `core_model_loading.convert_and_load_state_dict_in_model`,
ThreadPoolExecutor; later versions load in turn where they quantise). How far they get
is chance: it moves what is reserved, and what is allocated too where a weight takes a
hole that is too small to split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from memplan.simulator.events import EMPTY_CACHE, FREE, MARK, EventLog

Event = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOrder:
    """How a quantising load goes; by default as the installed packages do it."""

    lead_bytes: int = 0
    """How many bytes of weights threads keep on the card ahead of the quantiser."""
    empties_cache: bool = True
    """Whether k-bit preparation ends by emptying the cache (peft >= 0.20)."""


def reorder(log: EventLog, order: LoadOrder) -> EventLog:
    """The same fine-tune after a load of that order; `log` is one traced in turn."""
    load, rest = _split(log)
    events = [log.events[0], *_led(load, order.lead_bytes)]
    if not order.empties_cache:
        rest = [event for event in rest if event[0] != EMPTY_CACHE]
    return dataclasses.replace(log, events=events + rest)


def _split(log: EventLog) -> tuple[list[Event], list[Event]]:
    """The events of the load without its mark, and those from the next mark on."""
    marks = (n for n, (block, _) in enumerate(log.events[1:], 1) if block == MARK)
    end = next(marks, len(log.events))
    return log.events[1:end], log.events[end:]


def _led(load: list[Event], lead_bytes: int) -> Iterator[Event]:
    """The load's events, every weight as early as the lead allows.

    The warm-up block comes first. The weight that is next to be quantised arrives
    whatever its size, and does not count as waiting.
    """
    warm_up, *weights = [*_weights(load)] or [[]]
    yield from warm_up
    arrived, waiting_bytes = 0, 0
    for number, (arrival, *quantisation) in enumerate(weights):
        if arrived > number:
            waiting_bytes -= arrival[1]
        else:
            yield arrival
            arrived += 1
        while arrived < len(weights) and waiting_bytes < lead_bytes:
            yield weights[arrived][0]
            waiting_bytes += weights[arrived][0][1]
            arrived += 1
        yield from quantisation


def _weights(load: list[Event]) -> Iterator[list[Event]]:
    """The events of each weight: its arrival, and what quantising it allocates.

    A block that is freed within the load is a 16-bit weight, and its quantisation ends
    when it is freed.
    """
    freed = {block: n for n, (block, size) in enumerate(load) if size == FREE}
    position = 0
    while position < len(load):
        end = freed.get(load[position][0], position) + 1
        yield load[position:end]
        position = end
