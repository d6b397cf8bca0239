from __future__ import annotations

import math
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import InputError, UnknownNameError
from memplan.fields import (
    LARGEST_INTEGER,
    Choice,
    Flag,
    Integer,
    Kind,
    Names,
    Number,
    Options,
    Part,
    Pattern,
)

KINDS: dict[str, Kind] = {
    "choice": Choice(("none", "full")),
    "part": Part("methods"),
    "integer": Integer(1),
    "number": Number(0, below=1),
    "positive": Number(0, above_minimum=True, optional=True),
    "flag": Flag(),
    "names": Names(),
    "words": Names(("attention", "mlp")),
    "pattern": Pattern(Integer(1)),
    "options": Options(),
}

GOOD: list[tuple[str, Any, Any]] = [
    ("choice", "full", "full"),
    ("part", "lora", "lora"),
    ("integer", 1, 1),
    ("integer", LARGEST_INTEGER, LARGEST_INTEGER),
    ("number", 0, 0.0),
    ("number", 0.999, 0.999),
    ("positive", None, None),
    ("positive", 1, 1.0),
    ("flag", False, False),
    ("names", [], ()),
    ("names", ["lm_head"], ("lm_head",)),
    ("words", "mlp", "mlp"),
    ("words", ["q_proj", "v_proj"], ("q_proj", "v_proj")),
    ("pattern", {r"layers\.0\..*": 8}, {r"layers\.0\..*": 8}),
    ("options", {"lambda": 2, "mode": None}, {"lambda": 2, "mode": None}),
]

BAD: list[tuple[str, Any, str]] = [
    ("choice", "half", "is unknown"),
    ("choice", ["full"], "is unknown"),
    ("choice", None, "is unknown"),
    ("part", "lorra", "near: lora"),
    ("integer", 0, "is below 1"),
    ("integer", 2**31, "is above 2147483647"),
    ("integer", True, "is not a whole number"),
    ("integer", 8.0, "is not a whole number"),
    ("integer", "8", "is not a whole number"),
    ("number", 1, "is out of range"),
    ("number", -0.1, "is out of range"),
    ("number", math.nan, "is out of range"),
    ("number", 10**400, "is out of range"),
    ("number", True, "is not a number"),
    ("number", None, "is not a number"),
    ("positive", 0, "is out of range"),
    ("positive", math.inf, "is out of range"),
    ("flag", 1, "is not a truth value"),
    ("flag", "true", "is not a truth value"),
    ("names", "lm_head", "is not a list of names"),
    ("names", [1], "is not a module name"),
    ("names", [" "], "is not a module name"),
    ("words", [], "is empty"),
    ("words", "q_proj", "or one of: attention, mlp"),
    ("pattern", [8], "is not a mapping"),
    ("pattern", {"q_proj": 0}, "field['q_proj']: 0 is below 1"),
    ("pattern", {"(": 8}, "is not a regular expression"),
    ("pattern", {"": 8}, "is not a module name"),
    ("pattern", {8: 8}, "is not a module name"),
    ("options", "lambda", "is not a mapping"),
    ("options", {1: 2}, "is not an option's name"),
    ("options", {"lambda": [2]}, "is not a plain value"),
    ("options", {"lambda": math.nan}, "is not a plain value"),
]


@pytest.mark.parametrize(("kind", "value", "kept"), GOOD)
def test_good_value_is_kept(kind: str, value: Any, kept: Any) -> None:
    checked = KINDS[kind].check("field", value)

    assert checked == kept
    assert type(checked) is type(kept)


@pytest.mark.parametrize(("kind", "value", "problem"), BAD)
def test_bad_value_is_refused(kind: str, value: Any, problem: str) -> None:
    with pytest.raises(InputError) as error:
        KINDS[kind].check("field", value)

    assert str(error.value).startswith("field")
    assert problem in str(error.value)


@pytest.mark.parametrize(("kind", "value", "kept"), GOOD)
def test_schema_takes_good_values(kind: str, value: Any, kept: Any) -> None:
    jsonschema.validate(value, KINDS[kind].schema())


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("choice", "half"),
        ("part", "lorra"),
        ("integer", 0),
        ("integer", 2**31),
        ("integer", True),
        ("integer", "8"),
        ("number", 1),
        ("number", -0.1),
        ("number", None),
        ("positive", 0),
        ("flag", 1),
        ("names", "lm_head"),
        ("names", [1]),
        ("names", [" "]),
        ("words", []),
        ("pattern", [8]),
        ("pattern", {"q_proj": 0}),
        ("options", "lambda"),
        ("options", {"lambda": [2]}),
    ],
)
def test_schema_refuses_bad_values(kind: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, KINDS[kind].schema())


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("choice", "full", "full"),
        ("integer", " 16 ", 16),
        ("integer", "-1", -1),
        ("integer", "0x10", "0x10"),
        ("integer", "sixteen", "sixteen"),
        ("integer", "9" * 5000, "9" * 5000),
        ("number", "0.05", 0.05),
        ("number", "1e-1", 0.1),
        ("number", "none", "none"),
        ("positive", "none", None),
        ("positive", "null", None),
        ("positive", "1", 1.0),
        ("flag", "True", True),
        ("flag", "false", False),
        ("flag", "no", "no"),
        ("names", "", []),
        ("names", "lm_head, norm", ["lm_head", "norm"]),
        ("words", "attention", "attention"),
        ("words", "q_proj", ["q_proj"]),
        ("pattern", '{"q_proj": 8}', {"q_proj": 8}),
        ("pattern", "{q_proj: 8", "{q_proj: 8"),
        ("options", '{"lambda": 2}', {"lambda": 2}),
    ],
)
def test_text_of_an_option_is_read(kind: str, text: str, value: Any) -> None:
    assert KINDS[kind].parse("field", text) == value


def test_word_that_is_near_is_listed() -> None:
    with pytest.raises(UnknownNameError, match="near: full; it is one of: none, full"):
        KINDS["choice"].check("checkpointing", "ful")


@given(st.sampled_from(sorted(KINDS)), st.text())
def test_any_text_is_read_and_then_kept_or_refused(kind: str, text: str) -> None:
    value = KINDS[kind].parse("field", text)

    try:
        kept = KINDS[kind].check("field", value)
    except InputError:
        return
    assert KINDS[kind].check("field", kept) == kept
