"""The printed object, and the record of a run, as JSON schema (draft 2020-12)."""

from __future__ import annotations

from typing import Any

from memplan import profile
from memplan.footprint import CATEGORIES
from memplan.generation import CACHES, SAMPLINGS
from memplan.inference import ADAPTERS
from memplan.plan import HASH_DIGITS
from memplan.recipe import recipe_schema
from memplan.reporters.json import SCHEMA

KINDS = (
    "architecture",
    "comparison",
    "estimate",
    "explanation",
    "export",
    "fits",
    "gpus",
    "machine",
    "measurement",
    "models",
    "plan",
    "report",
    "runs",
    "simulation",
    "validation",
    "why-not",
)

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_TEXTS = {"type": "array", "items": _TEXT}
_BYTES = {"type": "integer"}
_COUNT = {"type": "integer", "minimum": 0}
_MAYBE_TEXT = {"type": ["string", "null"]}
_MAYBE_INTEGER = {"type": ["integer", "null"]}
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
    "estimate": (*_FOOTPRINT_KEYS, "margin_bytes", "limits", "terms"),
    "explanation": ("run", "ways"),
    "export": ("model", "recipe", "trainer", "files", "verified", "unverified"),
    "fits": ("gpu", "recipe", "fits", "lengths", "notes"),
    "gpus": ("gpus",),
    "machine": ("machine", "file", "missing"),
    "measurement": (*_FOOTPRINT_KEYS, "run", "device", "outcome", "step_seconds"),
    "models": ("models",),
    "report": ("title", "verdict", "fits", "files", "numbers"),
    "runs": ("runs",),
    "plan": (*_FOOTPRINT_KEYS, "plan"),
    "simulation": _FOOTPRINT_KEYS,
    "validation": ("runs", "groups", "left_out"),
    "why-not": (
        "model",
        "recipe",
        "gpu",
        "fits",
        "missing_bytes",
        "floor",
        "fixes",
        "of_little_help",
        "longest_sequence",
        "longest_sequence_with_a_gib_more",
        "doubts",
        "notes",
    ),
}
"""What an object of each kind has besides `schema`, `kind` and `versions`."""

_COMPARISONS = (
    ("gpu", "sides", "differences", "notes"),
    ("runs", "groups", "left_out"),
)
"""The same of comparisons: of fine-tunes, and of predictions with measured runs."""


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
            "inference": _or_null(_inference_schema()),
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
            "plan": _decision_schema(),
            **_why_not_schema(),
            "title": _TEXT,
            "verdict": _TEXT,
            "numbers": _ANY_OBJECT,
            "trainer": _TEXT,
            "files": _TEXTS,
            "verified": _TEXTS,
            "unverified": _TEXTS,
            "models": _list_of(name=_TEXT, model_type=_TEXT, total_parameters=_COUNT),
            "gpus": _list_of(name=_TEXT, capacity_bytes=_MAYBE_INTEGER),
            "runs": _list_of(id=_TEXT, card=_TEXT, outcome=_TEXT),
            "residuals": {
                "type": "object",
                "additionalProperties": _object(
                    least=_NUMBER, most=_NUMBER, count=_COUNT
                ),
            },
            "machine": _or_null(
                _object(card=_TEXT, capacity_bytes=_BYTES, context_bytes=_BYTES)
            ),
            "missing": {"type": "object", "additionalProperties": _TEXT},
            "groups": _list_of(reading=_TEXT, way=_TEXT, card=_TEXT, count=_COUNT),
            "ways": _list_of(
                way=_TEXT,
                differences=_list_of(what=_TEXT, reading=_TEXT, excess_bytes=_BYTES),
                explanations=_list_of(what=_TEXT, remaining_bytes=_BYTES),
            ),
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
        ]
        + [
            {
                "if": {"properties": {"kind": {"const": "comparison"}}},
                "then": {"anyOf": [{"required": list(keys)} for keys in _COMPARISONS]},
            }
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


def _inference_schema() -> dict[str, Any]:
    return _object(
        new_tokens=_COUNT,
        adapters={"enum": list(ADAPTERS)},
        sampling={"enum": list(SAMPLINGS)},
        cache={"enum": list(CACHES)},
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


def profile_schema() -> dict[str, Any]:
    """The file of a measured run; a reading of 0 bytes was not taken."""
    moment = _object(
        label=_TEXT,
        allocated_bytes=_COUNT,
        reserved_bytes=_COUNT,
        end_allocated_bytes=_COUNT,
    )
    footprint = _object(
        moments={"type": "array", "items": moment, "minItems": 1},
        context_bytes=_MAYBE_INTEGER,
        paged_bytes=_COUNT,
        failed_moment=_MAYBE_TEXT,
        missing_bytes=_COUNT,
    )
    counts = {"type": "object", "additionalProperties": {"type": "integer"}}
    numbers = {"type": "array", "items": {"type": "number"}}
    properties = {
        "schema": {"const": profile.SCHEMA},
        "kind": {"const": profile.KIND},
        "id": _TEXT,
        "source": _TEXT,
        "measured_at": _TEXT,
        "device": {"enum": list(profile.DEVICES)},
        "model": _TEXT,
        "config": {"type": ["object", "null"]},
        "recipe": {"type": "object"},
        "gpu": {"type": ["object", "null"]},
        "outcome": _object(status={"enum": list(profile.OUTCOMES)}, message=_TEXT),
        "footprint": {"anyOf": [footprint, {"type": "null"}]},
        "counters": {"type": "object", "additionalProperties": counts},
        "segments": counts,
        "driver": counts,
        "parameters": counts,
        "step_seconds": numbers,
        "losses": numbers,
        "environment": {"type": "object", "additionalProperties": _TEXT},
        "seed": {"type": "integer"},
        "inference": _or_null(_inference_schema()),
        "answer": {
            "type": "object",
            "properties": {
                "new_tokens": _COUNT,
                "saved_bytes": _COUNT,
                "same_answer": {"type": "boolean"},
                "problem": _TEXT,
            },
            "additionalProperties": False,
        },
        "weights": {"enum": ["random", "checkpoint"]},
        "trace": _TEXT,
        "notes": {"type": "array", "items": _TEXT},
    }
    # Records of before inference and answers were measured do not speak of them.
    required = [key for key in properties if key not in ("inference", "answer")]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "memplan measured run",
        **_object(**properties),
        "required": required,
        "additionalProperties": False,
    }


def plan_schema() -> dict[str, Any]:
    """A plan's file: what `memplan plan --json` prints."""
    output = output_schema()
    properties = output["properties"]
    kept = {key: properties[key] for key in ("schema", *_KEYS["plan"], "versions")}
    return {
        "$schema": output["$schema"],
        "title": "memplan plan",
        "description": "A recipe that fits a card, and why it was chosen. It is read "
        "wherever a recipe file is.",
        "type": "object",
        "properties": {
            **kept,
            "lengths": properties["lengths"],
            "kind": {"const": "plan"},
            "recipe": recipe_schema(),
        },
        "required": ["schema", "kind", *_KEYS["plan"], "versions"],
    }


def _why_not_schema() -> dict[str, Any]:
    """What `memplan why-not` says besides a footprint's keys."""
    change = _object(
        changes={"type": "object"},
        saved_bytes=_BYTES,
        missing_bytes=_COUNT,
        fits={"type": "boolean"},
        speed={"type": "number"},
    )
    breakdown = {"type": "object", "additionalProperties": _BYTES}
    return {
        "missing_bytes": _COUNT,
        "floor": _object(reserved_bytes=_COUNT, moment=_TEXT, breakdown=breakdown),
        "fixes": {"type": "array", "items": change},
        "of_little_help": {"type": "array", "items": change},
        "longest_sequence": _MAYBE_INTEGER,
        "longest_sequence_with_a_gib_more": _MAYBE_INTEGER,
        "doubts": _TEXTS,
    }


def _decision_schema() -> dict[str, Any]:
    """What a plan says besides its footprint."""
    number = {"type": ["number", "null"]}
    rejected = _object(changes={"type": "object"}, reason=_TEXT, missing_bytes=_BYTES)
    return _object(
        hash={"type": "string", "pattern": f"^[0-9a-f]{{{HASH_DIGITS}}}$"},
        budget_bytes=_BYTES,
        margin_bytes=_MAYBE_INTEGER,
        verified_by={"enum": ["simulation", "estimate"]},
        prefer=_TEXT,
        prior=_TEXT,
        tier={"enum": ["T0", "T1", "T2"]},
        solution={"type": "object"},
        regrets={"type": "object", "additionalProperties": number},
        reasons={"type": "array", "items": _TEXT},
        alternatives={"type": "array", "items": {"type": "object"}},
        rejected={"type": "array", "items": rejected},
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
