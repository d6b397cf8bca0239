"""What sorting takes on a card beside the values and positions that it returns.

Source: aten/src/ATen/native/cuda, Sort.cpp and SortStable.cu.
"""

from __future__ import annotations

POSITION_BYTES = 8
"""An index that a sort carries along."""

LARGEST_SMALL_SORT = 4096
"""Side up to which a sort runs in place (`should_use_small_sort`)."""

FEWEST_SEGMENTS = 128
"""Rows from which each is sorted for itself, with no copies beside the positions."""


def scratch_blocks(rows: int, side: int, item: int) -> tuple[int, ...]:
    """Bytes of each block: positions, and a radix sort's second set of both.

    Few rows are sorted together, by value and then by row; `item` is the size of a key.
    """
    if side <= LARGEST_SMALL_SORT:
        return ()
    count = rows * side
    together = 1 < rows < FEWEST_SEGMENTS
    return (1 + together) * (POSITION_BYTES * count,) + (radix_bytes(count, item),)


def radix_bytes(count: int, item: int) -> int:
    """A radix sort's second set of keys and positions (cub, DeviceRadixSort).

    Histograms come to less than a hundredth of it.
    """
    return (item + POSITION_BYTES) * count
