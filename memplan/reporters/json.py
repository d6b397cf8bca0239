"""The printed object: one JSON object on stdout, bytes as integers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import click

from memplan import __version__
from memplan.architecture import Architecture
from memplan.footprint import CATEGORIES, Footprint
from memplan.gpu import Gpu
from memplan.recipe import Recipe

SCHEMA = 1
"""The version of the printed object's schema."""

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

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


def report_architecture(architecture: Architecture, notes: Sequence[str]) -> None:
    """Prints an inspected model."""
    body = {
        "parameters": {
            "total": architecture.total_parameters,
            "trainable": None,
            "by_kind": architecture.parameters_by_kind,
        },
        "architecture": architecture.to_json(),
        "notes": [*architecture.notes, *notes],
    }
    _print({"kind": "architecture", "model": architecture.name, **body})


def report_list(kind: str, entries: list[dict[str, Any]]) -> None:
    """Prints a list of the catalog under its kind."""
    _print({"kind": kind, kind: entries})


def footprint_object(
    kind: str,
    model: str,
    recipe: Recipe,
    gpu: Gpu | None,
    footprint: Footprint,
    parameters: Mapping[str, int],
) -> dict[str, Any]:
    """The object that says what a fine-tune takes."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "model": model,
        "recipe": recipe.to_json(),
        "gpu": None if gpu is None else gpu.to_json(),
        **footprint.to_json(),
        "parameters": dict(parameters),
        "notes": [*(gpu.assumptions if gpu else ()), *footprint.notes],
        "versions": versions(),
    }


def print_object(obj: Mapping[str, Any]) -> None:
    """Prints an object as it is."""
    click.echo(json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False))


@functools.cache
def versions() -> dict[str, str]:
    """The versions of memplan and of the packages whose behaviour it derives."""
    found = {"memplan": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def output_schema() -> dict[str, Any]:
    """What `--json` prints, as JSON schema (draft 2020-12)."""
    num_bytes = {"type": "integer"}
    peak = {
        "type": "object",
        "properties": {
            "moment": {"type": "string"},
            "allocated_bytes": num_bytes,
            "reserved_bytes": num_bytes,
            "device_bytes": {"type": ["integer", "null"]},
        },
        "required": ["moment", "allocated_bytes", "reserved_bytes", "device_bytes"],
    }
    moment = {
        "type": "object",
        "properties": {
            "label": {"type": "string"},
            "allocated_bytes": num_bytes,
            "reserved_bytes": num_bytes,
        },
        "required": ["label", "allocated_bytes", "reserved_bytes"],
    }
    footprint_keys = ["recipe", "gpu", "peak", "life_peak", "fits", "moments"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "memplan output",
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "kind": {"enum": list(KINDS)},
            "model": {"type": "string"},
            "recipe": {"type": "object"},
            "gpu": {"type": ["object", "null"]},
            "peak": peak,
            "life_peak": peak,
            "fits": {"type": ["boolean", "null", "array"]},
            "moments": {"type": "array", "items": moment},
            "breakdown": {
                "type": "object",
                "properties": dict.fromkeys(CATEGORIES, num_bytes),
                "required": list(CATEGORIES),
            },
            "parameters": {
                "type": "object",
                "properties": {
                    "total": {"type": "integer"},
                    "trainable": {"type": ["integer", "null"]},
                },
                "required": ["total", "trainable"],
            },
            "notes": {"type": "array", "items": {"type": "string"}},
            "versions": {
                "type": "object",
                "additionalProperties": {"type": "string"},
            },
        },
        "required": ["schema", "kind", "versions"],
        "if": {"properties": {"kind": {"enum": ["estimate", "simulation"]}}},
        "then": {"required": [*footprint_keys, "breakdown", "parameters", "notes"]},
    }


def _print(body: Mapping[str, Any]) -> None:
    print_object({"schema": SCHEMA, **body, "versions": versions()})
