"""Where a CUDA driver places segments, on which the choice among equal blocks depends.

Measured on an H100 with driver 580: of 239 histories of the allocator, whose every
block the model gives where the card had it, 54 reserve another peak where segments only
lie below each other. `profiles/traces` has some of them; a T4's runs agree.

* What nothing holds is placed below all that is there, in a chunk of whole 32 MiB.
* What a chunk has left is taken first, in the lowest chunk where it fits, from its
  lowest address on: two segments of 16 MiB share a chunk, and the 12 MiB beside one of
  20 MiB take six small segments.
* A chunk that holds nothing any more is given back; no address of it is used again.

Left out: what the driver keeps of its own in the chunks, and addresses that were freed
by what ran before in the same process.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from memplan.units import MIB, round_up

CHUNK_BYTES = 32 * MIB
"""What a chunk is a multiple of."""

GRANULE_BYTES = 2 * MIB
"""What a place in a chunk is a multiple of."""

LAST_ADDRESS = 0x7000_0000_0000
"""Where the first chunk ends: any positive multiple of 32 MiB would do."""


_Chunk = tuple[int, int]
"""Where a chunk begins and ends."""


class _Hole(NamedTuple):
    """What is free of a chunk."""

    start: int
    end: int
    chunk: _Chunk


class Addresses:
    """The addresses of one process, given out in the order of its segments."""

    def __init__(self) -> None:
        self._lowest = LAST_ADDRESS
        self._holes: list[_Hole] = []
        """By their addresses."""
        self._chunks: dict[int, _Chunk] = {}
        """The chunks of the segments that there are, by their addresses."""

    def take(self, num_bytes: int) -> int:
        """The first address of a place for a segment."""
        size = round_up(num_bytes, GRANULE_BYTES)
        for number, hole in enumerate(self._holes):
            if hole.end - hole.start >= size:
                del self._holes[number]
                return self._place(size, hole)
        end = self._lowest
        self._lowest -= round_up(size, CHUNK_BYTES)
        chunk = (self._lowest, end)
        return self._place(size, _Hole(*chunk, chunk))

    def give_back(self, address: int, num_bytes: int) -> None:
        """Frees the place of a segment."""
        chunk = self._chunks.pop(address)
        start, end = address, address + round_up(num_bytes, GRANULE_BYTES)
        for hole in [hole for hole in self._holes if hole.chunk == chunk]:
            if hole.end == start or hole.start == end:
                self._holes.remove(hole)
                start, end = min(start, hole.start), max(end, hole.end)
        if (start, end) != chunk:
            insort(self._holes, _Hole(start, end, chunk))

    def _place(self, size: int, hole: _Hole) -> int:
        self._chunks[hole.start] = hole.chunk
        if hole.end - hole.start > size:
            insort(self._holes, hole._replace(start=hole.start + size))
        return hole.start
