"""Loads by threads, worked out by hand for an embedding and three quantised weights."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memplan.allocator import AllocatorSettings
from memplan.simulator.events import FREE, EventLog
from memplan.simulator.load_order import LoadOrder, reorder
from memplan.simulator.replay import replay
from memplan.units import MIB

WARM_UP, EMBEDDING, FIRST, SECOND, THIRD = 0, 1, 2, 4, 6
"""Blocks; each 16-bit weight is followed by the block that holds it in 4 bits."""


def in_turn() -> EventLog:
    log = EventLog()
    log.begin("load")
    log.free(log.allocate(100 * MIB, "load"))
    log.allocate(30 * MIB, "load")
    for _ in range(3):
        full = log.allocate(16 * MIB, "load")
        log.allocate(4 * MIB, "load")
        log.free(full)
    log.begin("adapt")
    log.allocate(8 * MIB, "to")
    log.empty_cache()
    log.begin("1.forward")
    return log


def loaded(log: EventLog) -> list[tuple[str, int]]:
    """The blocks of the load, each with what happens to it."""
    end = next(n for n, event in enumerate(log.events[1:], 1) if event[0] < 0)
    return [
        ("free" if size == FREE else "take", block) for block, size in log.events[1:end]
    ]


def test_without_a_lead_nothing_changes() -> None:
    assert reorder(in_turn(), LoadOrder()).events == in_turn().events


def test_a_lead_brings_weights_before_their_turn() -> None:
    lead = LoadOrder(lead_bytes=1)

    assert loaded(reorder(in_turn(), lead)) == [
        ("take", WARM_UP),
        ("free", WARM_UP),
        ("take", EMBEDDING),
        ("take", FIRST),
        ("take", SECOND),
        ("take", FIRST + 1),
        ("free", FIRST),
        ("take", THIRD),
        ("take", SECOND + 1),
        ("free", SECOND),
        ("take", THIRD + 1),
        ("free", THIRD),
    ]


def test_a_lead_without_end_holds_every_16_bit_weight_at_once() -> None:
    log = reorder(in_turn(), LoadOrder(lead_bytes=2**60))

    load = replay(log, AllocatorSettings(), None).moments[0]

    assert load.end_allocated_bytes == (30 + 3 * 4) * MIB
    assert load.allocated_bytes == 100 * MIB  # the warm-up block
    assert loaded(log)[2:6] == [
        ("take", block) for block in (EMBEDDING, FIRST, SECOND, THIRD)
    ]


def test_what_comes_after_the_load_stays() -> None:
    log, led = in_turn(), reorder(in_turn(), LoadOrder(lead_bytes=20 * MIB))

    assert led.events[-4:] == log.events[-4:]
    assert led.labels == log.labels


def test_the_cache_may_be_kept() -> None:
    kept = reorder(in_turn(), LoadOrder(empties_cache=False))

    moments = replay(in_turn(), AllocatorSettings(), None).moments
    kept_moments = replay(kept, AllocatorSettings(), None).moments
    assert len(kept.events) == len(in_turn().events) - 1
    assert kept_moments[-1].reserved_bytes >= moments[-1].reserved_bytes


def test_an_unquantised_load_has_no_order_to_change() -> None:
    log = EventLog()
    log.begin("load")
    for _ in range(3):
        log.allocate(MIB, "load")
    log.begin("adapt")

    assert reorder(log, LoadOrder(lead_bytes=MIB)).events == log.events


@given(st.integers(0, 100))
def test_a_lead_neither_adds_nor_drops_events(lead_mib: int) -> None:
    led = reorder(in_turn(), LoadOrder(lead_bytes=lead_mib * MIB))

    assert sorted(led.events) == sorted(in_turn().events)
    replay(led, AllocatorSettings(), None)
