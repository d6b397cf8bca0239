from __future__ import annotations

import pytest

from memplan.errors import (
    HubError,
    InputError,
    MemplanError,
    MissingExtraError,
    UnknownNameError,
    near_names,
    shown,
)


def test_input_error_names_field_value_and_way_out() -> None:
    error = InputError("rank", 0, "is below 1", "give a whole number of 1 or more")

    assert str(error) == "rank: 0 is below 1; give a whole number of 1 or more"
    assert (error.field, error.value) == ("rank", 0)


def test_exit_code_tells_bad_input_from_a_fault_of_memplan() -> None:
    assert MemplanError("broken").exit_code == 3
    for kind in (InputError, UnknownNameError, HubError, MissingExtraError):
        assert kind.exit_code == 2


def test_unknown_name_lists_the_near_ones() -> None:
    error = UnknownNameError("method", "lorra", ["full", "lora", "dora"])

    assert str(error) == "method: 'lorra' is unknown; near: lora, dora"


def test_unknown_name_without_a_near_one_gives_the_remedy() -> None:
    known = [f"name-{i}" for i in range(40)]

    error = UnknownNameError("method", "§", known, "look at the list")

    assert str(error) == (
        "method: '§' is unknown; nothing known is near it; look at the list"
    )


def test_value_that_is_no_text_is_near_nothing() -> None:
    assert "nothing known is near it" in str(UnknownNameError("f", [1], ["lora"]))


def test_missing_extra_says_how_to_install_it() -> None:
    error = MissingExtraError("inspecting x", "torch", "torch")

    assert str(error) == (
        "inspecting x: 'torch' is not installed; "
        "install it with: pip install 'memplan[torch]'"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("nf4", "'nf4'"),
        ("two\nlines", r"'two\nlines'"),
        ("\ud800", r"'\ud800'"),
        (None, "None"),
        ([1, [2, [3]]], "[1, [...]]"),
        ({"a": {"b": 1}}, "{'a': {...}}"),
    ],
)
def test_shown_is_one_line(value: object, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("value", ["x" * 10**6, 10**1000, list(range(10**6))])
def test_shown_is_cut(value: object) -> None:
    text = shown(value)

    assert len(text) <= 80
    assert "..." in text


def test_near_names_keep_their_case_and_ignore_it() -> None:
    assert near_names("LLAMA", ["Llama", "gpt2"]) == ["Llama"]


def test_part_of_a_name_is_near_it() -> None:
    known = ["meta-llama/Meta-Llama-3-8B", *(f"other/{i:040}" for i in range(40))]

    assert near_names("llama-3", known) == ["meta-llama/Meta-Llama-3-8B"]


def test_all_of_a_few_names_are_near_anything() -> None:
    assert near_names("xyz", ["full", "lora"]) == ["full", "lora"]
