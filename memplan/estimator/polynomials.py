"""Values of tapes' polynomials, for numbers and for arrays of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from memplan.allocator import MIN_BLOCK_BYTES
from memplan.tape import Polynomial, Stretch

_NUMBERS = (int, float)

StretchBytes = tuple[Any, Any]
"""What is live after a stretch, and the most within it, above its start; the latter is
minus infinity where nothing is noted."""


class Sizes(dict[str, Any]):
    """The values of monomials, made of those of the dimensions when first asked for."""

    def __init__(self, dimensions: Mapping[str, Any]) -> None:
        super().__init__(dimensions)
        self._are_numbers = all(isinstance(n, int) for n in dimensions.values())
        self._stretches: dict[int, StretchBytes] = {}

    def of(self, stretch: Stretch) -> StretchBytes:
        """A stretch's net bytes and its peak, which layers of one shape share."""
        known = self._stretches.get(id(stretch))
        if known is None:
            peaks = [value(polynomial, self) for polynomial in stretch.peaks]
            if self._are_numbers:
                peak = max(peaks, default=-math.inf)
            else:
                peak = functools.reduce(larger, peaks, -math.inf)
            known = self._stretches[id(stretch)] = value(stretch.net, self), peak
        return known

    def __missing__(self, word: str) -> Any:
        value = 1
        for letter in word:
            value = value * self[letter]
        self[word] = value
        return value


def value(polynomial: Polynomial, sizes: Sizes) -> Any:
    """sum of coefficient times monomial."""
    total = 0
    for word, coefficient in polynomial.items():
        total = total + coefficient * sizes[word]
    return total


def larger(one: Any, other: Any) -> Any:
    """The larger of two numbers, element by element where one is an array."""
    if isinstance(one, _NUMBERS) and isinstance(other, _NUMBERS):
        return one if one >= other else other
    import numpy as np

    return np.maximum(one, other)


def smaller(one: Any, other: Any) -> Any:
    """The smaller of two numbers, likewise."""
    return -larger(-one, -other)


def rounded(num_bytes: int) -> int:
    """Bytes rounded up as the allocator hands them out."""
    return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
