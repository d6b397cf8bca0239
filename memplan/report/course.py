"""`Course`: memory through a fine-tune's moments, by category."""

from __future__ import annotations

import itertools
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A moment as it is lived through; those of a micro-batch come again with it."""

    moment: str
    points: tuple[Point, ...]


Course = tuple[Stretch, ...]


def of_moments(moments: Iterable[Moment]) -> Course:
    """A point a moment: its peak, as an estimate knows it; empty without categories."""
    moments = tuple(moments)
    if not any(moment.breakdown for moment in moments):
        return ()
    return tuple(
        Stretch(
            moment=moment.label,
            points=(
                Point(
                    parts=_positive(moment.breakdown, moment.allocated_bytes),
                    reserved_bytes=moment.reserved_bytes,
                ),
            ),
        )
        for moment in moments
    )


def of_samples(samples: Iterable[Sample]) -> Course:
    """Points through each moment, at the largest of as many events each."""
    before = 0
    parts = dict.fromkeys(INSIDE, 0)
    found: list[Stretch] = []
    for moment, own in itertools.groupby(samples, lambda one: one.moment):
        events: list[_Event] = []
        for one in own:
            change = one.allocated_bytes - before
            before = one.allocated_bytes
            category = one.category or "activations"
            events.append((category, change, one.reserved_bytes))
        points = tuple(_thinned(events, parts))
        found.append(Stretch(moment=moment, points=points))
    return tuple(found)


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
