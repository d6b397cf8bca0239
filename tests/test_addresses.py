"""Where a driver places segments: as the first ones of an H100's histories lie."""

from __future__ import annotations

from memplan.addresses import CHUNK_BYTES, LAST_ADDRESS, Addresses
from memplan.units import MIB


def places(addresses: Addresses, *sizes: int) -> list[int]:
    """Where segments of so many MiB lie, in MiB from the end of the first chunk."""
    return [(addresses.take(size * MIB) - LAST_ADDRESS) // MIB for size in sizes]


def test_chunks_of_32_mib_lie_below_each_other() -> None:
    assert places(Addresses(), 86, 86, 32) == [-96, -192, -224]


def test_what_a_chunk_has_left_is_taken_from_its_lowest_address_on() -> None:
    assert places(Addresses(), 86, 2, 2, 16, 16) == [-96, -10, -8, -128, -112]


def test_the_lowest_chunk_with_room_comes_first() -> None:
    assert places(Addresses(), 20, 20, 2, 20, 2) == [-32, -64, -44, -96, -76]


def test_what_does_not_fit_into_a_rest_gets_a_chunk() -> None:
    assert places(Addresses(), 20, 16, 12) == [-32, -64, -48]


def test_a_place_that_was_given_back_is_taken_again() -> None:
    addresses = Addresses()
    places(addresses, 16, 16)
    addresses.give_back(LAST_ADDRESS - 32 * MIB, 16 * MIB)

    assert places(addresses, 20, 12, 12) == [-64, -44, -32]


def test_neighbours_that_were_given_back_are_one_place() -> None:
    addresses = Addresses()
    places(addresses, 10, 10, 10)
    for start in (-32, -22):
        addresses.give_back(LAST_ADDRESS + start * MIB, 10 * MIB)

    assert places(addresses, 20) == [-32]


def test_a_chunk_that_holds_nothing_is_gone() -> None:
    addresses = Addresses()
    places(addresses, 20, 2)
    addresses.give_back(LAST_ADDRESS - 32 * MIB, 20 * MIB)
    addresses.give_back(LAST_ADDRESS - 12 * MIB, 2 * MIB)

    assert places(addresses, 2) == [-2 * CHUNK_BYTES // MIB]


def test_sizes_are_whole_pages_of_two_mib() -> None:
    addresses = Addresses()

    assert addresses.take(1) == LAST_ADDRESS - CHUNK_BYTES
    assert addresses.take(3 * MIB) == LAST_ADDRESS - CHUNK_BYTES + 2 * MIB
    assert addresses.take(1) == LAST_ADDRESS - CHUNK_BYTES + 6 * MIB
