"""Fine-tunes side by side on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from memplan.comparison import Difference, Side, differences
from memplan.gpu import Gpu
from memplan.reporters import json, terminal
from memplan.units import format_bytes

MOST_SIDES = len(ascii_uppercase)

Bytes = Callable[[Side | Difference], Mapping[str, int]]


def report(sides: tuple[Side, ...]) -> None:
    """Prints what each side takes, and how much more than the first."""
    letters = ascii_uppercase[: len(sides)]
    for letter, side in zip(letters, sides, strict=True):
        peak = side.footprint.peak.label
        terminal.say(
            f"{letter}: {side.name}, {side.model} ({side.kind}), peak in {peak}"
        )
    found = differences(sides)
    _report_recipes(letters, found)
    _report("at the peak", sides, found, lambda one: one.breakdown)
    _report("peak", sides, found, lambda one: one.readings)
    _report("moment (allocated)", sides, found, lambda one: one.moments)


def report_object(
    sides: tuple[Side, ...], gpu: Gpu | None, notes: Sequence[str]
) -> None:
    """Prints the sides, and what each takes beyond the first, as one object."""
    body = {
        "gpu": None if gpu is None else gpu.to_json(),
        "sides": [side.to_json() for side in sides],
        "differences": [one.to_json() for one in differences(sides)],
        "notes": list(notes),
    }
    json.report_object("comparison", body)


def _report_recipes(letters: str, found: Sequence[Difference]) -> None:
    """The keys in which any side differs from the first."""
    keys = dict.fromkeys(key for one in found for key in one.recipe)
    if not keys:
        return
    first = found[0].first
    sides = (first, *(one.other for one in found))
    terminal.table(
        ("recipe", *letters),
        [(key, *(shown(side.recipe.get(key)) for side in sides)) for key in keys],
        wraps=tuple(letters),
    )


def _report(
    title: str, sides: Sequence[Side], found: Sequence[Difference], bytes_of: Bytes
) -> None:
    letters = ascii_uppercase[: len(sides)]
    changes = [f"{letter} - A" for letter in letters[1:]]
    columns = [bytes_of(side) for side in sides]
    differing = [bytes_of(one) for one in found]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [
        (
            name.removesuffix("_bytes").replace("_", " "),
            *(_bytes(column.get(name)) for column in columns),
            *(_change(column.get(name)) for column in differing),
        )
        for name in names
        if any(column.get(name) for column in columns)
    ]
    if rows:
        terminal.table(
            (title, *letters, *changes), rows, right=(*letters, *changes), title=" "
        )


def _bytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def _change(num_bytes: int | None) -> str:
    if num_bytes is None:
        return ""
    return f"+{format_bytes(num_bytes)}" if num_bytes > 0 else format_bytes(num_bytes)


def shown(value: object) -> str:
    """A recipe's value as a cell of a table."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
