"""Sizes and counts as people write and read them; the only place that rounds."""

from __future__ import annotations

import math
import re

from memplan.errors import InputError

KIB = 2**10
MIB = 2**20
GIB = 2**30

BYTES_PER_UNIT = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
}
"""GB is 10^9 and GiB is 2^30, as SI and IEC define them."""

COUNT_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""How the field writes counts of parameters."""

_COUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kKmMbBtT]?)\s*")
_SIZE = re.compile(r"\s*([+-]?[0-9]+(?:\.[0-9]*)?|[+-]?\.[0-9]+)\s*([a-zA-Z]*)\s*")


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is no smaller than a value."""
    return -(-value // multiple) * multiple


def is_size(text: str) -> bool:
    """Whether a text is read as a size and not as a name."""
    return _SIZE.fullmatch(text) is not None


def parse_size(text: str, field: str) -> int:
    """The bytes that a size such as `12GB` or `11.6GiB` stands for.

    Raises InputError for a missing or unknown unit and for a size that is not positive.
    """
    match = _SIZE.fullmatch(text)
    remedy = "write a number and a unit, such as 12GB (10^9) or 11.6GiB (2^30)"
    if match is None:
        raise InputError(field, text, "is not a size", remedy)
    number, unit = match.groups()
    if not unit:
        raise InputError(field, text, "has no unit", remedy)
    if unit.lower() not in BYTES_PER_UNIT:
        raise InputError(field, text, f"has the unknown unit {unit!r}", remedy)
    value = float(number) * BYTES_PER_UNIT[unit.lower()]
    if value < 1:
        raise InputError(field, text, "is not a positive size", remedy)
    if not math.isfinite(value) or value > 2**60:
        raise InputError(field, text, "is larger than any memory", remedy)
    return int(value)


def parse_count(text: str, field: str) -> int:
    """The count that `8B`, `350M` or plain digits stand for."""
    match = _COUNT.fullmatch(text)
    if match is None or len(text) > 40:
        remedy = "write it as 8B, 350M or 7000000000"
        raise InputError(field, text, "is not a count", remedy)
    number, suffix = match.groups()
    return int(float(number) * COUNT_SUFFIXES.get(suffix.upper(), 1))


def format_bytes(num_bytes: int) -> str:
    """Bytes in the unit that reads best: `12.35 GiB`, `140.9 MiB`, `512 B`."""
    size = abs(num_bytes)
    if size >= 100 * MIB:
        return f"{num_bytes / GIB:,.2f} GiB"
    if size >= 100 * KIB:
        return f"{num_bytes / MIB:,.1f} MiB"
    if size >= KIB:
        return f"{num_bytes / KIB:,.1f} KiB"
    return f"{num_bytes} B"


def format_count(count: int) -> str:
    """A count of parameters as the field writes it: `6.74 B`, `19.99 M`, `512`."""
    for suffix, scale in reversed(COUNT_SUFFIXES.items()):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {suffix}"
    return str(count)
