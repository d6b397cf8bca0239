from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import InputError
from memplan.units import (
    format_bytes,
    format_count,
    is_size,
    parse_count,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("12GB", 12 * 10**9),
        ("12 gb", 12 * 10**9),
        ("12GiB", 12 * 2**30),
        ("11.6GiB", 12455405158),  # 11.6 * 1073741824 = 12455405158.4
        ("1.5TB", 15 * 10**11),
        (".5MiB", 2**19),
        ("7.MB", 7 * 10**6),
        ("1024B", 1024),
        ("3kib", 3072),
    ],
)
def test_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_size(text, "--gpu") == num_bytes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("12", "has no unit"),
        ("0GB", "is not a positive size"),
        ("-1GB", "is not a positive size"),
        ("0.1B", "is not a positive size"),
        ("12XB", "has the unknown unit 'XB'"),
        ("12 G B", "is not a size"),
        ("GB", "is not a size"),
        ("", "is not a size"),
        ("1e9GB", "is not a size"),
        ("1\N{ARABIC-INDIC DIGIT ZERO}GB", "is not a size"),
        (f"{'9' * 400}GB", "is larger than any memory"),
        ("2000000TB", "is larger than any memory"),
    ],
)
def test_bad_size_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError, match="--gpu: ") as error:
        parse_size(text, "--gpu")

    assert problem in str(error.value)
    assert "12GB (10^9) or 11.6GiB (2^30)" in str(error.value)


@given(st.integers(1, 2**59))
def test_bytes_survive_being_written_and_read(num_bytes: int) -> None:
    # A size is read as a double, whose 53 bits of mantissa bound the relative error.
    assert abs(parse_size(f"{num_bytes}B", "size") - num_bytes) <= num_bytes * 2**-52


def test_names_are_not_sizes() -> None:
    assert is_size("12GB")
    assert is_size("12")
    assert is_size("-1 GB")
    assert not is_size("RTX 3060")
    assert not is_size("a100-80gb")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (100 * 2**10, "0.1 MiB"),
        (1536 * 2**10, "1.5 MiB"),
        (100 * 2**20, "0.10 GiB"),
        (12 * 2**30, "12.00 GiB"),
        (2000 * 2**30, "2,000.00 GiB"),
        (-3 * 2**30, "-3.00 GiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_reads_best(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8B", 8 * 10**9),
        ("350m", 350 * 10**6),
        ("1.5 T", 15 * 10**11),
        ("70k", 70_000),
        ("7000000000", 7 * 10**9),
        ("0", 0),
    ],
)
def test_count_is_read(text: str, count: int) -> None:
    assert parse_count(text, "--max-params") == count


@pytest.mark.parametrize("text", ["", "B", "-8B", "8GB", "8 B B", "nan", "9" * 400])
def test_bad_count_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--max-params: .* is not a count"):
        parse_count(text, "--max-params")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (512, "512"),
        (1000, "1.00 K"),
        (19_988_480, "19.99 M"),
        (6_738_415_616, "6.74 B"),
        (1_026_408_232_448, "1.03 T"),
    ],
)
def test_count_is_shown_as_the_field_writes_it(count: int, text: str) -> None:
    assert format_count(count) == text
