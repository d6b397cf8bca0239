"""Sizes of blocks as monomials of the dimensions that they were made from.

A block's size is a product of a tensor's sides. Where each dimension has a prime factor
of its own, its power shows in how often that prime divides the size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from memplan.simulator.events import EventLog
from memplan.tape import Polynomial

BATCH = 1031
"""A prime that divides no dimension of a model."""

RANK = 1009
"""Another such prime, the rank of adapted experts."""

LENGTHS = (1016, 488)
"""Lengths of two runs: multiples of 8, as most are, each with a prime of its own, and
below the fewest positions that a model learns."""

LENGTH_PRIMES = (127, 61)

ROUNDED_LENGTH = 1024
"""The first of the lengths, rounded up as kernels do that work in tiles."""

ROOMS = {"L": (1046, 523), "P": (1048, 131)}
"""Tokens that a static cache has room for, above the LENGTHS, with a prime that tells
it; and as many as a row of its mask has, where that is padded to a multiple of 8."""

LARGE_BYTES = 2**12
"""Bytes a sequence from which on a size that shows no length is asked again."""


def sizes_in_batch(
    first: EventLog, second: EventLog | None = None, *, has_room: bool = False
) -> list[Polynomial]:
    """Sizes of blocks in B, T and the rank r, from a run with each of the LENGTHS.

    `has_room`: and in L and P, where a static cache has room for more.

    A kernel's scratch is often as long as the sequence rounded up, which no prime
    shows; how it grows from one run to the other does. Where a loop over parts of the
    sequence makes more blocks in one run than in the other, each is its share of it.
    """
    length = (LENGTHS[0], LENGTH_PRIMES[0])
    rooms = ROOMS if has_room else {}
    dimensions = Dimensions(
        {"B": (BATCH, BATCH), "T": length, "r": (RANK, RANK)} | rooms
    )
    sizes = [_with_sink(dimensions.monomial(size)) for size in first.sizes]
    if second is None:
        return sizes
    others = _alike(second)
    for place, blocks in _alike(first).items():
        seconds = others.get(place, [])
        repeats = len(blocks) > len(seconds) > 0
        for number, block in enumerate(blocks):
            if not _hides_length(sizes[block]):
                continue
            if repeats:
                sizes[block] = {"BT": first.sizes[block] / BATCH / ROUNDED_LENGTH}
            elif len(blocks) == len(seconds):
                pair = first.sizes[block], second.sizes[seconds[number]]
                sizes[block] = _in_rounded_length(*pair)
    return sizes


def _with_sink(size: Polynomial) -> Polynomial:
    """Scores of T tokens and a sink, which models join to them: T + 1 of each of T.

    Likewise of L tokens, where these are a static cache's.
    """
    lengths = {"T": LENGTHS[0], "L": ROOMS["L"][0]}
    for word, coefficient in size.items():
        for letter, length in lengths.items():
            each, rest = divmod(coefficient, length + 1)
            if "T" in word and not rest:
                return {word + letter: each, word: each}
    return size


def _alike(log: EventLog) -> dict[tuple[str, str], list[int]]:
    """Blocks by the operator that made them, and the module that it was called in."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for block, place in enumerate(zip(log.operators, log.modules, strict=True)):
        blocks.setdefault(place, []).append(block)
    return blocks


def hides_length(num_bytes: int) -> bool:
    """Whether a size may be as long as the sequence, without showing it."""
    return num_bytes % LENGTH_PRIMES[0] != 0 and num_bytes >= LARGE_BYTES * BATCH


def _hides_length(size: Polynomial) -> bool:
    return any(
        not {*word} & {"T", "r", *ROOMS} and c >= LARGE_BYTES
        for word, c in size.items()
    )


def _in_rounded_length(first: int, second: int) -> Polynomial:
    power = round(math.log(first / second, LENGTHS[0] / LENGTHS[1]))
    if first % BATCH:
        # Scratch by blocks of tokens.
        return {"BT" * power: first / (BATCH * LENGTHS[0]) ** power}
    return {"B" + "T" * power: first // BATCH / ROUNDED_LENGTH**power}


class Dimensions:
    """Dimensions by letter, each with the prime that tells it."""

    def __init__(
        self, dimensions: Mapping[str, tuple[int, int]], shared: int = 1
    ) -> None:
        """Takes for each letter the dimension and its prime.

        `shared` is one that divides others, and is a dimension of its own where it is
        left over.
        """
        self._dimensions = dimensions
        self._shared = shared

    def monomial(self, num_bytes: int) -> Polynomial:
        """The size as one monomial; empty for none."""
        if num_bytes == 0:
            return {}
        word, rest, value = "", num_bytes, 1
        for letter, (dimension, prime) in self._dimensions.items():
            while rest % prime == 0:
                word, rest, value = word + letter, rest // prime, value * dimension
                has_shared = prime != self._shared and dimension % self._shared == 0
                if has_shared and rest % self._shared == 0:
                    rest //= self._shared
        return {word: _exact(num_bytes, value)}


def _exact(num_bytes: int, value: int) -> float:
    whole, rest = divmod(num_bytes, value)
    return num_bytes / value if rest else whole


def add(one: Polynomial, other: Polynomial, sign: int = 1) -> Polynomial:
    """one + sign other, without monomials that vanish."""
    total = dict(one)
    for word, coefficient in other.items():
        total[word] = total.get(word, 0) + sign * coefficient
    return {word: c for word, c in total.items() if c}


def is_below(one: Polynomial, other: Polynomial) -> bool:
    """Whether no coefficient of the first is above the second's."""
    return all(
        one.get(word, 0) <= other.get(word, 0) for word in one.keys() | other.keys()
    )


def largest(candidates: Iterable[Polynomial]) -> list[Polynomial]:
    """Those that are not below another."""
    kept: list[Polynomial] = []
    for candidate in candidates:
        if any(is_below(candidate, other) for other in kept):
            continue
        kept = [other for other in kept if not is_below(other, candidate)]
        kept.append(candidate)
    return kept
