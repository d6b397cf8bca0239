"""Estimates beside the simulated grid, as reports/accuracy_estimate.md has them.

`python tests/estimate_report.py` makes the report again; estimates of recipes that no
tape is shipped for are traced, which takes minutes.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from memplan import tapes
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.errors import InputError, MissingExtraError
from memplan.estimator import estimate
from memplan.recipe import Recipe
from tests.simulated_grid import card_of, read_grid

REPORT = Path(__file__).parent.parent / "reports" / "accuracy_estimate.md"

SHOWN_FROM = 0.01
"""The error from which a row is listed by itself."""

DEVICE_SHOWN_FROM = 0.02
"""The same of device bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A row of the grid and the estimate's relative errors."""

    row: dict[str, Any]
    allocated: float
    device: float


@functools.cache
def architecture_of(model: str) -> Architecture:
    return inspect(model)


def judge(row: dict[str, Any]) -> Judged:
    """The errors of the estimate of a row."""
    gpu = card_of(row["gpu"])
    found = estimate(architecture_of(row["model"]), Recipe(**row["recipe"]), gpu)
    simulated = row["peak"]
    device = found.device_bytes(found.peak) or 0
    return Judged(
        row=row,
        allocated=found.peak.allocated_bytes / simulated["allocated_bytes"] - 1,
        device=device / simulated["device_bytes"] - 1,
    )


def needs_no_torch(row: dict[str, Any]) -> bool:
    """Whether the catalog ships all tapes that a row's estimate needs."""
    if "refused" in row:
        return False

    def refuse(architecture: object) -> None:
        raise MissingExtraError("tracing", "torch", "torch")

    try:
        with mock.patch.object(tapes, "_taping", refuse):
            judge(row)
    except (InputError, MissingExtraError):
        return False
    return True


def judged_grid() -> tuple[list[Judged], int]:
    """All rows that can be estimated, and how many the estimate refuses."""
    judged, refused = [], 0
    for row in read_grid():
        if "refused" in row:
            continue
        try:
            judged.append(judge(row))
        except InputError:
            refused += 1
    return judged, refused


def summary(judged: Iterable[Judged], key: Callable[[Judged], float]) -> str:
    errors = sorted(abs(key(one)) for one in judged)
    within = [sum(error <= limit for error in errors) for limit in (0.03, 0.08)]
    return (
        f"{len(errors)} | {statistics.median(errors):.2%} | "
        f"{errors[int(0.9 * len(errors))]:.2%} | {errors[-1]:.2%} | "
        f"{within[0]} | {within[1]}"
    )


def report() -> str:
    """The report as Markdown."""
    judged, refused = judged_grid()
    lines = [
        "# The estimate beside the simulation",
        "",
        "Made by `python tests/estimate_report.py` from "
        "[a grid of simulated recipes](../profiles/simulated/grid.json), drawn from a "
        "seed over 12 models, 5 cards, methods, quantisations, optimizers, losses, "
        "shapes and precisions. Errors are relative to the simulated peak of the "
        "training steps.",
        "",
        "| reading | rows | median | 90 % within | worst | within 3 % | 8 % |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| allocated | {summary(judged, lambda one: one.allocated)} |",
        f"| device | {summary(judged, lambda one: one.device)} |",
        "",
        *([f"The estimate refuses {refused} rows.", ""] if refused else []),
        "Allocated bytes are the closed form's. Device bytes add what the caching "
        "allocator's rules make of its blocks, replayed one by one, and the context. "
        "Where fragments decide, a block that comes one place earlier may save or cost "
        "a whole segment: the rows that are off by more than "
        f"{DEVICE_SHOWN_FROM:.0%} are listed.",
        "",
        "## By model, allocated",
        "",
        "| model | rows | median | 90 % within | worst | within 3 % | 8 % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model in dict.fromkeys(one.row["model"] for one in judged):
        own = [one for one in judged if one.row["model"] == model]
        lines.append(f"| {model} | {summary(own, lambda one: one.allocated)} |")
    lines += [
        "",
        f"## Rows that are off by more than {SHOWN_FROM:.0%}, worst first",
        "",
        *_listed(judged, "allocated"),
    ]
    lines += ["", "## Device bytes, likewise", "", *_listed(judged, "device")]
    return "\n".join(lines) + "\n"


def _listed(judged: list[Judged], reading: str) -> list[str]:
    least = {"allocated": SHOWN_FROM, "device": DEVICE_SHOWN_FROM}[reading]
    lines = ["| error | model | card | recipe |", "|--:|---|---|---|"]
    for one in sorted(judged, key=lambda one: -abs(getattr(one, reading))):
        error = getattr(one, reading)
        if abs(error) > least:
            row = one.row
            keys = ", ".join(f"{key} {value}" for key, value in row["recipe"].items())
            lines.append(f"| {error:+.2%} | {row['model']} | {row['gpu']} | {keys} |")
    return lines


if __name__ == "__main__":
    REPORT.write_text(report(), encoding="utf-8")
