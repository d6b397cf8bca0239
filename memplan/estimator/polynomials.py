"""Values of tapes' polynomials, for numbers and for arrays of them."""

from __future__ import annotations

from typing import Any

from memplan.allocator import MIN_BLOCK_BYTES
from memplan.tape import Polynomial


class Sizes(dict[str, Any]):
    """The values of monomials, made of those of the dimensions when first asked for."""

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
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one if one >= other else other
    import numpy as np

    return np.maximum(one, other)


def smaller(one: Any, other: Any) -> Any:
    """The smaller of two numbers, likewise."""
    return -larger(-one, -other)


def rounded(num_bytes: int) -> int:
    """Bytes rounded up as the allocator hands them out."""
    return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
