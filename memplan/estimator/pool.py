"""One pool of the caching allocator under its defaults, for what is replayed often.

The rules are memplan.allocator's, which a test holds it to: of one stream, with none of
the settings, and without statistics but for what is reserved. Half the time goes.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from memplan.addresses import Addresses
from memplan.allocator import (
    MIN_BLOCK_BYTES,
    SMALL_LIMIT_BYTES,
    UNLIMITED_BYTES,
    segment_bytes,
)

_ADDRESS_BITS = 64


class PoolFullError(Exception):
    """A block that finds no place, even after the cache has been given back."""


class Block:
    """A piece of a segment, linked to those beside it in address order; bytes."""

    __slots__ = ("address", "following", "is_free", "preceding", "size_bytes")

    def __init__(
        self, address: int, size_bytes: int, preceding: Block | None = None
    ) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.preceding = preceding
        self.following: Block | None = None
        self.is_free = False


class Pool:
    """The large pool, or the small one."""

    def __init__(
        self,
        addresses: Addresses,
        capacity_bytes: int | None = None,
        *,
        is_small: bool = False,
    ) -> None:
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self._addresses = addresses
        self._capacity_bytes = (
            UNLIMITED_BYTES if capacity_bytes is None else capacity_bytes
        )
        self._least_rest_bytes = MIN_BLOCK_BYTES if is_small else SMALL_LIMIT_BYTES + 1
        self._keys: list[int] = []
        """Of the free blocks, in order."""
        self._blocks: dict[int, Block] = {}
        """The free blocks, by their keys."""

    def malloc(self, num_bytes: int) -> Block:
        """The best fit, or a new segment's; raises PoolFullError."""
        size = (num_bytes + MIN_BLOCK_BYTES - 1) & -MIN_BLOCK_BYTES
        keys = self._keys
        index = bisect_left(keys, size << _ADDRESS_BITS)
        if index < len(keys):
            block = self._blocks.pop(keys.pop(index))
        else:
            block = self._new(size)
        rest_bytes = block.size_bytes - size
        if rest_bytes >= self._least_rest_bytes:
            rest = Block(block.address + size, rest_bytes, block)
            after = rest.following = block.following
            if after is not None:
                after.preceding = rest
            block.following = rest
            block.size_bytes = size
            self._cache(rest)
        block.is_free = False
        return block

    def free(self, block: Block | None) -> None:
        """Takes a block back, merged with what is free beside it."""
        if block is None:
            return
        after = block.following
        if after is not None and after.is_free:
            self._forget(after)
            block = _merged(block, after)
        before = block.preceding
        if before is not None and before.is_free:
            self._forget(before)
            block = _merged(before, block)
        self._cache(block)

    def empty_cache(self) -> None:
        """Gives every wholly free segment back."""
        for block in [self._blocks[key] for key in self._keys]:
            if block.preceding is None and block.following is None:
                self._forget(block)
                self._addresses.give_back(block.address, block.size_bytes)
                self.reserved_bytes -= block.size_bytes

    def _new(self, size: int) -> Block:
        num_bytes = segment_bytes(size)
        if self.reserved_bytes + num_bytes > self._capacity_bytes:
            self.empty_cache()
        reserved_bytes = self.reserved_bytes + num_bytes
        if reserved_bytes > self._capacity_bytes:
            raise PoolFullError(f"{size} bytes find no place")
        self.reserved_bytes = reserved_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved_bytes)
        return Block(self._addresses.take(num_bytes), num_bytes)

    def _cache(self, block: Block) -> None:
        block.is_free = True
        key = block.size_bytes << _ADDRESS_BITS | block.address
        self._blocks[key] = block
        insort(self._keys, key)

    def _forget(self, block: Block) -> None:
        key = block.size_bytes << _ADDRESS_BITS | block.address
        del self._blocks[key]
        del self._keys[bisect_left(self._keys, key)]


def _merged(block: Block, absorbed: Block) -> Block:
    """A block with the one after it, whose object is dead from then on."""
    block.size_bytes += absorbed.size_bytes
    after = block.following = absorbed.following
    if after is not None:
        after.preceding = block
    return block
