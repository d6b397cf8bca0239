"""`Course`: memory through a fine-tune's moments, by category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memplan.footprint import CATEGORIES, OUTSIDE_TORCH, Moment
from memplan.simulation import Sample

INSIDE = tuple(name for name in CATEGORIES if name not in (*OUTSIDE_TORCH, "cache"))
"""The categories of what torch has allocated."""

POINTS = 16
"""Points that a moment of a simulation is drawn by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Memory at a point of a moment."""

    parts: Mapping[str, int]
    """Bytes by INSIDE, none negative."""
    reserved_bytes: int

    @property
    def allocated_bytes(self) -> int:
        return sum(self.parts.values())


Course = Mapping[str, tuple[Point, ...]]
"""By moment, in order: the points that it is drawn by."""


def of_moments(moments: Iterable[Moment]) -> Course:
    """A point a moment: its peak, as an estimate knows it; empty without categories."""
    moments = tuple(moments)
    if not any(moment.breakdown for moment in moments):
        return {}
    return {
        moment.label: (
            Point(
                parts=_positive(moment.breakdown, moment.allocated_bytes),
                reserved_bytes=moment.reserved_bytes,
            ),
        )
        for moment in moments
    }


def of_samples(samples: Iterable[Sample]) -> Course:
    """Points through each moment, at the largest of as many events each."""
    events: dict[str, list[_Event]] = defaultdict(list)
    before = 0
    for one in samples:
        change = one.allocated_bytes - before
        before = one.allocated_bytes
        event = (one.category or "activations", change, one.reserved_bytes)
        events[one.moment].append(event)
    parts = dict.fromkeys(INSIDE, 0)
    return {moment: tuple(_thinned(own, parts)) for moment, own in events.items()}


_Event = tuple[str, int, int]
"""A category, by how much it changed, and what was reserved then."""


def _thinned(events: list[_Event], parts: dict[str, int]) -> Iterable[Point]:
    """The largest point of each of POINTS stretches; `parts` is walked along."""
    stretch = -(-len(events) // POINTS)
    for start in range(0, len(events), stretch):
        largest = Point(parts={}, reserved_bytes=0)
        for category, change, reserved in events[start : start + stretch]:
            parts[category] += change
            total = sum(parts.values())
            if total >= largest.allocated_bytes:
                largest = Point(parts=dict(parts), reserved_bytes=reserved)
        yield largest


def _positive(breakdown: Mapping[str, int], allocated_bytes: int) -> dict[str, int]:
    """Parts none of which is negative, with the same sum.

    An estimate counts weights as they will be, and takes off what of them is not there
    yet while they load.
    """
    parts = {name: breakdown.get(name, 0) for name in INSIDE}
    lacking = sum(min(size, 0) for size in parts.values())
    parts = {name: max(size, 0) for name, size in parts.items()}
    parts["weights"] += lacking + allocated_bytes - sum(breakdown.values())
    return parts
