"""The estimate's pool does what the allocator does under its defaults."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memplan.addresses import Addresses
from memplan.allocator import (
    SMALL_LIMIT_BYTES,
    AllocatorSettings,
    CachingAllocator,
    OutOfMemory,
)
from memplan.estimator.pool import Pool, PoolFullError
from memplan.units import KIB, MIB

CAPACITY_BYTES = 400 * MIB

LARGE = st.one_of(
    st.integers(SMALL_LIMIT_BYTES + 1, 150 * MIB),
    st.sampled_from([2, 10, 16, 20, 64]).map(lambda mib: mib * MIB),
)
SMALL = st.one_of(
    st.integers(1, SMALL_LIMIT_BYTES),
    st.sampled_from([1, 64, 512]).map(lambda kib: kib * KIB),
)
FREE, EMPTY = "free", "empty"


def steps(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[list[tuple[object, int]]]:
    """Requests by their bytes, blocks freed by their turn, and the cache emptied."""
    free = st.tuples(st.just(FREE), st.integers(0, 1000))
    empty = st.tuples(st.just(EMPTY), st.just(0))
    request = st.tuples(sizes, st.just(0))
    return st.lists(st.one_of(request, request, free, free, empty), max_size=80)


def follow(is_small: bool, asked: list[tuple[object, int]]) -> int:
    """Takes the steps side by side; how often there was no place."""
    allocator = CachingAllocator(AllocatorSettings(), CAPACITY_BYTES)
    pool = Pool(Addresses(), CAPACITY_BYTES, is_small=is_small)
    live = []
    num_full = 0
    for what, turn in asked:
        if what == EMPTY:
            allocator.empty_cache()
            pool.empty_cache()
        elif what == FREE:
            if live:
                theirs, ours = live.pop(turn % len(live))
                allocator.free(theirs)
                pool.free(ours)
        else:
            assert isinstance(what, int)
            try:
                theirs = allocator.malloc(what)
            except OutOfMemory:
                theirs = None
            try:
                ours = pool.malloc(what)
            except PoolFullError:
                assert theirs is None
                num_full += 1
            else:
                assert theirs is not None
                assert (ours.address, ours.size_bytes) == (
                    theirs.address,
                    theirs.size_bytes,
                )
                live.append((theirs, ours))
        assert pool.reserved_bytes == allocator.reserved_bytes
        assert pool.peak_reserved_bytes == allocator.peak_reserved_bytes
    return num_full


@given(asked=steps(LARGE))
def test_the_large_pool_gives_what_the_allocator_gives(
    asked: list[tuple[object, int]],
) -> None:
    follow(False, asked)


@given(asked=steps(SMALL))
def test_the_small_pool_gives_what_the_allocator_gives(
    asked: list[tuple[object, int]],
) -> None:
    follow(True, asked)


def test_a_cache_is_given_back_before_a_request_fails() -> None:
    halves = CAPACITY_BYTES // 2
    asked = [(halves, 0), (halves, 0), (halves, 0), (FREE, 0), (halves + 2 * MIB, 0)]
    again = [*asked, (FREE, 0), (CAPACITY_BYTES, 0)]

    assert follow(False, asked) == 2
    assert follow(False, again) == 2
