"""What a recipe's field may hold: one class a kind of value.

Each kind checks a value (naming the field, the value and the way out), reads it from
the text of a command line option, and says itself as JSON schema.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memplan import registry
from memplan.errors import InputError, UnknownNameError

LARGEST_INTEGER = 2**31 - 1
"""Sizes and counts beyond what PyTorch's 32-bit sizes of kernels take are refused."""


class Kind(ABC):
    """What values a field may hold."""

    @abstractmethod
    def check(self, field: str, value: Any) -> Any:
        """The value as the recipe keeps it; raises InputError if it cannot be used."""

    @abstractmethod
    def parse(self, field: str, text: str) -> Any:
        """The value that an option's text stands for, not yet checked."""

    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """The kind as JSON schema."""


@dataclass(frozen=True, slots=True)
class Choice(Kind):
    """One of a few words."""

    words: tuple[str, ...]

    def check(self, field: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise UnknownNameError(
                field, value, self.words, f"it is one of: {', '.join(self.words)}"
            )
        return value

    def parse(self, field: str, text: str) -> str:
        return text

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.words)}


@dataclass(frozen=True, slots=True)
class Part(Kind):
    """The name of a part that a folder of the package holds."""

    folder: str

    def check(self, field: str, value: Any) -> str:
        return Choice(registry.names(self.folder)).check(field, value)

    def parse(self, field: str, text: str) -> str:
        return text

    def schema(self) -> dict[str, Any]:
        return Choice(registry.names(self.folder)).schema()


@dataclass(frozen=True, slots=True)
class Integer(Kind):
    """A whole number from `minimum` on."""

    minimum: int

    def check(self, field: str, value: Any) -> int:
        remedy = f"give a whole number of {self.minimum} or more"
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(field, value, "is not a whole number", remedy)
        if value < self.minimum:
            raise InputError(field, value, f"is below {self.minimum}", remedy)
        if value > LARGEST_INTEGER:
            raise InputError(field, value, f"is above {LARGEST_INTEGER}", remedy)
        return value

    def parse(self, field: str, text: str) -> Any:
        return int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", text) else text

    def schema(self) -> dict[str, Any]:
        return {
            "type": "integer",
            "minimum": self.minimum,
            "maximum": LARGEST_INTEGER,
        }


@dataclass(frozen=True, slots=True)
class Number(Kind):
    """A finite number within bounds, or null where `optional`."""

    minimum: float
    below: float = math.inf
    above_minimum: bool = False
    optional: bool = False

    def check(self, field: str, value: Any) -> float | None:
        if value is None and self.optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(field, value, "is not a number", self._remedy())
        if abs(value) > LARGEST_INTEGER or not math.isfinite(value):
            raise InputError(field, value, "is out of range", self._remedy())
        low = value <= self.minimum if self.above_minimum else value < self.minimum
        if low or value >= self.below:
            raise InputError(field, value, "is out of range", self._remedy())
        return float(value)

    def parse(self, field: str, text: str) -> Any:
        if self.optional and text.strip().lower() in ("none", "null", ""):
            return None
        try:
            return float(text)
        except ValueError:
            return text

    def schema(self) -> dict[str, Any]:
        low = "exclusiveMinimum" if self.above_minimum else "minimum"
        schema: dict[str, Any] = {
            "type": ["number", "null"] if self.optional else "number",
            low: self.minimum,
        }
        if math.isfinite(self.below):
            schema["exclusiveMaximum"] = self.below
        return schema

    def _remedy(self) -> str:
        low = "above" if self.above_minimum else "of at least"
        below = f" and below {self.below:g}" if math.isfinite(self.below) else ""
        null = ", or null" if self.optional else ""
        return f"give a number {low} {self.minimum:g}{below}{null}"


@dataclass(frozen=True, slots=True)
class Flag(Kind):
    """True or false."""

    def check(self, field: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InputError(field, value, "is not a truth value", "give true or false")
        return value

    def parse(self, field: str, text: str) -> Any:
        return {"true": True, "false": False}.get(text.strip().lower(), text)

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Names(Kind):
    """A list of module names; or one of `words`, which stand for such a list."""

    words: tuple[str, ...] = ()

    def check(self, field: str, value: Any) -> str | tuple[str, ...]:
        if isinstance(value, str) and value in self.words:
            return value
        remedy = "give a list of module names"
        if self.words:
            remedy += f", or one of: {', '.join(self.words)}"
        if not isinstance(value, list | tuple):
            raise InputError(field, value, "is not a list of names", remedy)
        for name in value:
            if not isinstance(name, str) or not name.strip():
                raise InputError(field, name, "is not a module name", remedy)
        if self.words and not value:
            raise InputError(field, value, "is empty", remedy)
        return tuple(value)

    def parse(self, field: str, text: str) -> Any:
        if text in self.words:
            return text
        return [name.strip() for name in text.split(",")] if text.strip() else []

    def schema(self) -> dict[str, Any]:
        names: dict[str, Any] = {
            "type": "array",
            "items": {"type": "string", "pattern": r"\S"},
        }
        if not self.words:
            return names
        return {"anyOf": [{"enum": list(self.words)}, names | {"minItems": 1}]}


@dataclass(frozen=True, slots=True)
class Pattern(Kind):
    """PEFT's patterns: a regular expression of module names -> a number."""

    value_kind: Kind

    def check(self, field: str, value: Any) -> dict[str, Any]:
        return {
            self._expression(field, key): self.value_kind.check(f"{field}[{key!r}]", v)
            for key, v in _mapping(field, value).items()
        }

    def parse(self, field: str, text: str) -> Any:
        return _json_object(text)

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.value_kind.schema()}

    def _expression(self, field: str, key: Any) -> str:
        remedy = (
            "give module names or regular expressions, as PEFT's patterns take them"
        )
        if not isinstance(key, str) or not key:
            raise InputError(field, key, "is not a module name", remedy)
        try:
            with warnings.catch_warnings(action="ignore"):
                re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                field, key, f"is not a regular expression ({error})", remedy
            ) from error
        return key


@dataclass(frozen=True, slots=True)
class Options(Kind):
    """A method's own options: names -> plain values, checked further by the method."""

    def check(self, field: str, value: Any) -> dict[str, Any]:
        options = dict(_mapping(field, value))
        for key, option in options.items():
            if not isinstance(key, str):
                raise InputError(field, key, "is not an option's name", "give text")
            if not _is_plain(option):
                raise InputError(
                    f"{field}.{key}",
                    option,
                    "is not a plain value",
                    "give a number, text, true, false or null",
                )
        return options

    def parse(self, field: str, text: str) -> Any:
        return _json_object(text)

    def schema(self) -> dict[str, Any]:
        plain = {"type": ["number", "string", "boolean", "null"]}
        return {"type": "object", "additionalProperties": plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def _mapping(field: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InputError(
            field, value, "is not a mapping", 'write it as {"name": value, ...}'
        )
    return value


def _json_object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
