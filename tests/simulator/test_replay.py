"""Logs written by hand, replayed: peaks, cache, cap and what was live."""

from __future__ import annotations

from memplan.allocator import AllocatorSettings
from memplan.simulator.events import EventLog
from memplan.simulator.replay import replay
from memplan.units import MIB

SETTINGS = AllocatorSettings()


def two_moments() -> EventLog:
    """A 64 MiB weight; in the step a 32 MiB and then a 16 MiB tensor beside it."""
    log = EventLog()
    log.begin("load")
    log.allocate(64 * MIB, "load", "head")
    log.begin("1.forward")
    first = log.allocate(32 * MIB, "mm", "layers.0")
    log.free(first)
    log.allocate(16 * MIB, "add", "layers.1", "logits")
    return log


def test_moments_hold_their_own_peaks() -> None:
    found = replay(two_moments(), SETTINGS, None)

    load, forward = found.moments
    assert (load.label, load.allocated_bytes) == ("load", 64 * MIB)
    assert forward.allocated_bytes == 96 * MIB
    assert forward.end_allocated_bytes == 80 * MIB
    assert forward.reserved_bytes == 96 * MIB


def test_the_breakdown_is_that_of_the_peak() -> None:
    found = replay(two_moments(), SETTINGS, None)

    assert found.moments[1].breakdown == {
        "weights": 64 * MIB,
        "activations": 32 * MIB,
    }
    assert [(b.operator, b.module) for b in found.peak_blocks] == [
        ("load", "head"),
        ("mm", "layers.0"),
    ]


def test_a_moment_that_comes_again_keeps_its_worst() -> None:
    log = EventLog()
    for size in (40, 60, 20):
        log.begin("1.forward")
        log.free(log.allocate(size * MIB, "mm"))

    (moment,) = replay(log, SETTINGS, None).moments

    assert moment.allocated_bytes == 60 * MIB
    assert moment.end_allocated_bytes == 0


def test_the_cache_is_given_back_when_it_is_emptied() -> None:
    log = EventLog()
    log.begin("load")
    log.free(log.allocate(40 * MIB, "load"))
    log.empty_cache()
    log.begin("adapt")
    log.allocate(20 * MIB, "to")

    load, adapt = replay(log, SETTINGS, None).moments

    assert load.reserved_bytes == 40 * MIB
    assert adapt.reserved_bytes == 20 * MIB


def test_a_cap_fails_in_the_moment_that_does_not_fit() -> None:
    found = replay(two_moments(), SETTINGS, 80 * MIB)

    assert found.failed_moment == "1.forward"
    assert [moment.label for moment in found.moments] == ["load", "1.forward"]


def test_near_the_cap_the_cache_is_given_back_before_it_fails() -> None:
    # 30 MiB cached cannot hold 40 MiB, and 64 + 30 + 40 is above 110: it is returned.
    log = EventLog()
    log.begin("load")
    log.allocate(64 * MIB, "load")
    log.begin("1.forward")
    log.free(log.allocate(30 * MIB, "mm"))
    log.allocate(40 * MIB, "mm")

    found = replay(log, SETTINGS, 110 * MIB)

    assert found.failed_moment is None
    assert found.num_alloc_retries == 1
    assert found.moments[1].reserved_bytes == 104 * MIB
