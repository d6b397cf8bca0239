"""How far predictions were from measured runs: the errors that memplan carries.

`memplan validate --residuals` writes them; they are shown beside a prediction, and
nothing of them enters it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memplan.gpu import Gpu
from memplan.recipe import Recipe
from memplan.store import profiles_path, read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """What is kept of a comparison: its errors, and what it may be compared with."""

    id: str
    way: str
    device: str
    compute_capability: tuple[int, int]
    method: str
    quantization: str
    errors: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The errors of comparable runs in one reading."""

    least: float
    most: float
    count: int


def comparable_errors(
    recipe: Recipe, gpu: Gpu | None, way: str = "simulate"
) -> dict[str, Range]:
    """By reading: how far that way's predictions were from comparable runs.

    Comparable are runs of the same method and quantisation on cards of the same compute
    capability. Nothing of this enters a prediction.
    """
    if gpu is None:
        return {}
    found: dict[str, list[float]] = {}
    asked = (way, gpu.compute_capability, recipe.method, recipe.quantization)
    for one in kept_residuals():
        kind = (one.way, one.compute_capability, one.method, one.quantization)
        if kind == asked:
            for reading, error in one.errors.items():
                found.setdefault(reading, []).append(error)
    return {
        reading: Range(least=min(errors), most=max(errors), count=len(errors))
        for reading, errors in found.items()
    }


def residuals_file() -> Path:
    """The file of the residuals that memplan carries."""
    return profiles_path() / "residuals.json"


@functools.cache
def kept_residuals() -> tuple[Residual, ...]:
    """The residuals that memplan carries, as `memplan validate` wrote them."""
    file = residuals_file()
    if not file.is_file():
        return ()
    return tuple(
        Residual(**row | {"compute_capability": tuple(row["compute_capability"])})
        for row in read_json(file)
    )
