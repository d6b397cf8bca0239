"""The printed object as JSON schema (draft 2020-12)."""

from __future__ import annotations

from typing import Any

from memplan.footprint import CATEGORIES
from memplan.reporters.json import SCHEMA

KINDS = (
    "architecture",
    "comparison",
    "estimate",
    "fits",
    "gpus",
    "measurement",
    "models",
    "plan",
    "simulation",
)

_TEXT = {"type": "string"}
_BYTES = {"type": "integer"}
_COUNT = {"type": "integer", "minimum": 0}
_MAYBE_INTEGER = {"type": ["integer", "null"]}
_MAYBE_TEXT = {"type": ["string", "null"]}
_ANY_OBJECT = {"type": "object"}

_FOOTPRINT_KEYS = (
    "model",
    "recipe",
    "gpu",
    "peak",
    "life_peak",
    "fits",
    "moments",
    "breakdown",
    "parameters",
    "notes",
)
_KEYS = {
    "architecture": ("model", "parameters", "architecture", "notes"),
    "comparison": ("gpu", "sides", "differences", "notes"),
    "estimate": (*_FOOTPRINT_KEYS, "margin_bytes", "limits", "terms"),
    "fits": ("gpu", "recipe", "fits", "lengths", "notes"),
    "gpus": ("gpus",),
    "models": ("models",),
    "simulation": _FOOTPRINT_KEYS,
}
"""What an object of each kind has besides `schema`, `kind` and `versions`."""


def output_schema() -> dict[str, Any]:
    """What `--json` prints."""
    peak = _object(
        moment=_TEXT,
        allocated_bytes=_BYTES,
        reserved_bytes=_BYTES,
        device_bytes=_MAYBE_INTEGER,
    )
    moment = _object(label=_TEXT, allocated_bytes=_BYTES, reserved_bytes=_BYTES)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "memplan output",
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "kind": {"enum": list(KINDS)},
            "model": _TEXT,
            "recipe": {"type": "object"},
            "gpu": {"type": ["object", "null"]},
            "peak": peak,
            "life_peak": peak,
            "fits": {
                "type": ["boolean", "null", "array"],
                "items": _answer_schema(peak),
            },
            "margin_bytes": _MAYBE_INTEGER,
            "limits": _limits_schema(),
            "terms": _list_of(
                term={"enum": list(CATEGORIES)},
                bytes=_BYTES,
                equation=_TEXT,
                shares=_list_of(equation=_TEXT, bytes=_BYTES),
            ),
            "lengths": _lengths_schema(),
            "sides": _list_of(
                name=_TEXT, kind=_TEXT, model=_TEXT, recipe=_ANY_OBJECT, peak=peak
            ),
            "differences": _differences_schema(),
            "moments": {"type": "array", "items": moment},
            "breakdown": _object(**dict.fromkeys(CATEGORIES, _BYTES)),
            "parameters": _object(total=_COUNT, trainable=_MAYBE_INTEGER),
            "host": {"type": "object", "additionalProperties": _COUNT},
            "architecture": _architecture_schema(),
            "models": _list_of(name=_TEXT, model_type=_TEXT, total_parameters=_COUNT),
            "gpus": _list_of(name=_TEXT, capacity_bytes=_MAYBE_INTEGER),
            "notes": {"type": "array", "items": _TEXT},
            "versions": {"type": "object", "additionalProperties": _TEXT},
        },
        "required": ["schema", "kind", "versions"],
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}},
                "then": {"required": list(keys)},
            }
            for kind, keys in _KEYS.items()
        ],
    }


def _answer_schema(peak: dict[str, Any]) -> dict[str, Any]:
    """Whether a model fits in one way; no peak where it was not estimated."""
    return _object(
        model=_TEXT,
        model_type=_TEXT,
        total_parameters=_COUNT,
        method=_TEXT,
        quantization=_TEXT,
        batch_size=_COUNT,
        sequence_length=_COUNT,
        fits={"type": "boolean"},
        peak=_or_null(peak),
        life_peak=_or_null(peak),
        margin_bytes=_MAYBE_INTEGER,
        longest_sequence_length=_MAYBE_INTEGER,
        weights_bytes=_COUNT,
        problem=_MAYBE_TEXT,
    )


def _limits_schema() -> dict[str, Any]:
    return _or_null(
        _object(
            largest_batch_size=_MAYBE_INTEGER, longest_sequence_length=_MAYBE_INTEGER
        )
    )


def _lengths_schema() -> dict[str, Any]:
    """How long samples are, and where they were asked for, what batches they make."""
    return _or_null(
        _object(
            samples=_COUNT,
            tokens=_COUNT,
            mean={"type": "number"},
            p50=_COUNT,
            p99=_COUNT,
            max=_COUNT,
        )
    )


def _differences_schema() -> dict[str, Any]:
    bytes_by_name = {"type": "object", "additionalProperties": _BYTES}
    return _list_of(
        name=_TEXT,
        against=_TEXT,
        recipe=_ANY_OBJECT,
        peak=bytes_by_name,
        breakdown=bytes_by_name,
        moments=bytes_by_name,
    )


def _architecture_schema() -> dict[str, Any]:
    linear = _object(path=_TEXT, in_features=_COUNT, out_features=_COUNT, kind=_TEXT)
    shape = {"type": "array", "items": _COUNT}
    parameter = _object(path=_TEXT, shape=shape, kind=_TEXT)
    block = _object(
        name=_TEXT,
        stack=_TEXT,
        layers={"type": "array", "items": _COUNT},
        linears={"type": "array", "items": linear},
        parameters={"type": "array", "items": parameter},
    )
    return _object(
        name=_TEXT,
        model_type=_TEXT,
        config={"type": "object"},
        blocks={"type": "array", "items": block},
        linears={"type": "array", "items": linear},
        parameters={"type": "array", "items": parameter},
    )


def _object(**properties: Any) -> dict[str, Any]:
    """An object that has at least those properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _list_of(**properties: Any) -> dict[str, Any]:
    return {"type": "array", "items": _object(**properties)}
