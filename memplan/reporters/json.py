"""The printed object: one JSON object on stdout, bytes as integers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from memplan import __version__
from memplan.architecture import Architecture
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.inference import Inference
from memplan.recipe import Recipe
from memplan.residuals import Range

if TYPE_CHECKING:
    from memplan.accuracy import Explained
    from memplan.machine import Reading
    from memplan.profile import Profile

SCHEMA = 1
"""The version of the printed object's schema."""

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
        "notes": list(notes),
    }
    _print({"kind": "architecture", "model": architecture.name, **body})


def report_list(kind: str, entries: list[dict[str, Any]]) -> None:
    """Prints a list of the catalog under its kind."""
    _print({"kind": kind, kind: entries})


def report_object(kind: str, body: Mapping[str, Any]) -> None:
    """Prints an object of a kind."""
    _print({"kind": kind, **body})


def footprint_object(  # noqa: PLR0913 - each is a key of the object
    kind: str,
    model: str,
    recipe: Recipe,
    gpu: Gpu | None,
    footprint: Footprint,
    parameters: Mapping[str, int],
    inference: Inference | None = None,
) -> dict[str, Any]:
    """The object that says what a fine-tune takes, or inference."""
    asked = {} if inference is None else {"inference": inference.to_json()}
    return {
        "schema": SCHEMA,
        "kind": kind,
        "model": model,
        "recipe": recipe.to_json(),
        **asked,
        "gpu": None if gpu is None else gpu.to_json(),
        **footprint.to_json(),
        "parameters": dict(parameters),
        "notes": [*(gpu.assumptions if gpu else ()), *footprint.notes],
        "versions": versions(),
    }


def residuals(errors: Mapping[str, Range]) -> dict[str, Any]:
    """The errors of comparable runs, as they are printed beside a prediction."""
    return {reading: dataclasses.asdict(one) for reading, one in errors.items()}


def print_validation(
    runs: list[dict[str, Any]],
    groups: list[dict[str, Any]],
    left_out: Mapping[str, str],
) -> None:
    """Prints measured runs beside their predictions, and the errors by group."""
    body = {"runs": runs, "groups": groups, "left_out": dict(left_out)}
    _print({"kind": "validation", **body})


def print_explanations(run: Profile, found: Sequence[Explained]) -> None:
    """Prints where a run differs from its predictions, and what would explain it."""
    ways = [
        {
            "way": one.comparison.way,
            "comparison": one.comparison.to_json(),
            "differences": [
                {**dataclasses.asdict(each), "excess_bytes": each.excess_bytes}
                for each in one.differences
            ],
            "explanations": [dataclasses.asdict(each) for each in one.explanations],
        }
        for one in found
    ]
    _print({"kind": "explanation", "run": run.id, "ways": ways})


def print_machine(
    reading: Reading | None, file: str | None, missing: Mapping[str, str]
) -> None:
    """Prints what was measured of this machine's card, where it is kept, what lacks."""
    _print(
        {
            "kind": "machine",
            "machine": None if reading is None else dataclasses.asdict(reading),
            "file": file,
            "missing": dict(missing),
        }
    )


def print_object(obj: Mapping[str, Any]) -> None:
    """Prints an object as it is."""
    click.echo(json.dumps(obj, indent=2, allow_nan=False))


@functools.cache
def versions() -> dict[str, str]:
    """The versions of memplan and of the packages whose behaviour it derives."""
    # Its import costs a tenth of an estimate, and only --json asks for versions.
    from importlib import metadata

    found = {"memplan": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _print(body: Mapping[str, Any]) -> None:
    print_object({"schema": SCHEMA, **body, "versions": versions()})
