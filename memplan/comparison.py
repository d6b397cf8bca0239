"""`Side` and `Difference`: footprints side by side, whatever they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memplan.errors import InputError
from memplan.footprint import CATEGORIES, OUTSIDE_TORCH, Footprint, Moment
from memplan.validation import Readings, t4_runs

FIELD = "--against"

T4_PREFIX = "t4:"
"""Begins the name of a measured run of `profiles/ground_truth/t4_runs.json`."""

_REMEDY = (
    "give what --json printed of an estimate, a simulation, a plan or a measurement, "
    "or t4:N for a measured run on a T4"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the fine-tunes that are compared."""

    name: str
    kind: str
    """`estimate`, `simulation`, `measurement`, ...: how its bytes are known."""
    model: str
    recipe: Mapping[str, Any]
    footprint: Footprint
    parameters: Mapping[str, int]

    @property
    def breakdown(self) -> dict[str, int]:
        """The peak by categories; empty where a measurement has none."""
        peak = self.footprint.peak
        return self.footprint.breakdown if peak.breakdown else {}

    @property
    def readings(self) -> dict[str, int]:
        """What the counters say at the peak of the steps."""
        peak = self.footprint.peak
        found = {
            "allocated_bytes": peak.allocated_bytes,
            "reserved_bytes": peak.reserved_bytes,
        }
        device_bytes = self.footprint.device_bytes(peak)
        return found if device_bytes is None else found | {"device_bytes": device_bytes}

    @property
    def moments(self) -> dict[str, int]:
        """The allocated peak of each moment."""
        return {m.label: m.allocated_bytes for m in self.footprint.moments}

    def to_json(self) -> dict[str, Any]:
        """The side as output shows it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "model": self.model,
            "recipe": dict(self.recipe),
            **self.footprint.to_json(),
            "breakdown": self.breakdown,
            "parameters": dict(self.parameters),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a side takes beyond the first one, bytes by name; both must know the name.

    Where memory is measured or simulated, a term's bytes are at the peak of its own
    side, which may be in another moment.
    """

    first: Side
    other: Side

    @property
    def recipe(self) -> dict[str, tuple[Any, Any]]:
        """The keys that differ, each with both values."""
        ours, theirs = self.first.recipe, self.other.recipe
        return {
            key: (ours.get(key), theirs.get(key))
            for key in dict.fromkeys((*ours, *theirs))
            if ours.get(key) != theirs.get(key)
        }

    @property
    def readings(self) -> dict[str, int]:
        return _minus(self.other.readings, self.first.readings)

    @property
    def breakdown(self) -> dict[str, int]:
        return _minus(self.other.breakdown, self.first.breakdown)

    @property
    def moments(self) -> dict[str, int]:
        return _minus(self.other.moments, self.first.moments)

    def to_json(self) -> dict[str, Any]:
        """The difference as output shows it."""
        return {
            "name": self.other.name,
            "against": self.first.name,
            "recipe": {key: list(values) for key, values in self.recipe.items()},
            "peak": self.readings,
            "breakdown": self.breakdown,
            "moments": self.moments,
        }


def differences(sides: tuple[Side, ...]) -> tuple[Difference, ...]:
    """What each other side takes beyond the first."""
    return tuple(Difference(first=sides[0], other=side) for side in sides[1:])


def measured_t4(name: str) -> Side:
    """The measured run that `t4:N` names; raises InputError where there is none."""
    runs = t4_runs()
    number = name.removeprefix(T4_PREFIX)
    if not number.isdecimal() or int(number) >= len(runs):
        last = len(runs) - 1
        raise InputError(FIELD, name, "names no run", f"give t4:0 to t4:{last}")
    run = runs[int(number)]
    return Side(
        name=name,
        kind="measurement",
        model=run.model,
        recipe=run.recipe.to_json(),
        footprint=_footprint_of_readings(run.readings),
        parameters={},
    )


def side_of(name: str, data: Any) -> Side:
    """The side that a printed object or a measured record is; raises InputError."""
    if not isinstance(data, Mapping):
        raise InputError(FIELD, name, "is no object", _REMEDY)
    nested = data.get("footprint")
    try:
        footprint = (
            _printed_footprint(data)
            if not isinstance(nested, Mapping)
            else _recorded_footprint(nested)
        )
        return Side(
            name=name,
            kind=str(data["kind"]),
            model=str(data["model"]),
            recipe=dict(data.get("recipe") or {}),
            footprint=footprint,
            parameters={
                key: value
                for key, value in dict(data.get("parameters") or {}).items()
                if isinstance(value, int)
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"holds no footprint ({type(error).__name__}: {error})"
        raise InputError(FIELD, name, problem, _REMEDY) from error


def _minus(ours: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int]:
    return {name: ours[name] - theirs[name] for name in ours if name in theirs}


def _printed_footprint(data: Mapping[str, Any]) -> Footprint:
    """The footprint of which `Footprint.to_json` is a part of the object."""
    breakdown = {key: _whole(value) for key, value in data["breakdown"].items()}
    inside = {
        name: breakdown.get(name, 0)
        for name in CATEGORIES
        if name not in (*OUTSIDE_TORCH, "cache")
    }
    peak = data["peak"]["moment"]
    moments = tuple(
        Moment(
            label=str(one["label"]),
            allocated_bytes=_whole(one["allocated_bytes"]),
            reserved_bytes=_whole(one["reserved_bytes"]),
            breakdown=inside if one["label"] == peak and breakdown else {},
        )
        for one in data["moments"]
    )
    if not moments:
        raise ValueError("no moments")
    has_card = data["peak"]["device_bytes"] is not None
    return Footprint(
        moments=moments,
        context_bytes=breakdown.get("context", 0) if has_card else None,
        paged_bytes=breakdown.get("paged", 0),
    )


def _recorded_footprint(data: Mapping[str, Any]) -> Footprint:
    """The footprint that a measured record holds, which knows no categories."""
    moments = tuple(
        Moment(
            label=str(one["label"]),
            allocated_bytes=_whole(one["allocated_bytes"]),
            reserved_bytes=_whole(one["reserved_bytes"]),
        )
        for one in data["moments"]
    )
    if not moments:
        raise ValueError("no moments")
    context = data.get("context_bytes")
    return Footprint(
        moments=moments,
        context_bytes=None if context is None else _whole(context),
        paged_bytes=_whole(data.get("paged_bytes", 0)),
    )


def _footprint_of_readings(readings: Readings) -> Footprint:
    """A steady step's peaks, all of them under one reserved peak."""
    peaks = {
        "2.forward": readings.forward_bytes,
        "2.backward": readings.backward_bytes,
        "2.optimizer": readings.optimizer_bytes,
    }
    return Footprint(
        moments=tuple(
            Moment(
                label=label,
                allocated_bytes=num_bytes,
                reserved_bytes=readings.reserved_bytes,
            )
            for label, num_bytes in peaks.items()
        )
    )


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number of bytes")
    return value
