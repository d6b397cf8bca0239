"""Predictions beside everything that was measured, as a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memplan.accuracy import READINGS, Comparison, groups_of
from memplan.reporters.accuracy import COLUMNS, NUMBERS, group_row, run_row, worst_first
from memplan.reporters.document import Document, Section, Table
from memplan.reporters.figures import validation


def document(
    comparisons: Sequence[Comparison],
    left_out: Mapping[str, str],
    versions: Mapping[str, str],
) -> Document:
    """The report on every run; errors are (predicted - measured) / measured."""
    groups = groups_of(comparisons)
    told = ", ".join(f"{name} {one}" for name, one in versions.items())
    return Document(
        name="validation",
        title="Predicted beside measured",
        verdict=_verdict(comparisons),
        lead=(
            "No prediction reads a measurement, and nothing is fitted. Errors are "
            "(predicted - measured) / measured; groups of runs are never pooled.",
        ),
        sections=(
            *(_reading(comparisons, reading) for reading in READINGS),
            Section(
                title="By group",
                table=Table(
                    columns=COLUMNS, rows=[*map(group_row, groups)], right=NUMBERS
                ),
            ),
            Section(
                title="Every run, the worst first",
                words=("Cells hold predicted / measured GiB, and the error.",),
                table=Table(
                    columns=("run", "by", *READINGS, "outcome", "predicted"),
                    rows=[run_row(one) for one in worst_first(comparisons)],
                    right=READINGS,
                ),
            ),
            Section(
                title="What was left out",
                words=(
                    *(f"{run}: {reason}" for run, reason in left_out.items()),
                    f"Versions: {told}.",
                ),
            ),
        ),
        numbers={
            "kind": "validation",
            "groups": [group.to_json() for group in groups],
            "runs": [one.to_json() for one in comparisons],
        },
    )


def _verdict(comparisons: Sequence[Comparison]) -> str:
    errors = [
        abs(one.errors["allocated"])
        for one in comparisons
        if one.way == "simulate" and "allocated" in one.errors
    ]
    if not errors:
        return "No run that was measured can be compared."
    within = sum(error <= 0.01 for error in errors)
    return (
        f"Of {len(errors)} measured runs, {within} have their allocated peak simulated "
        f"within 1 %; the worst is off by {max(errors):.2%}."
    )


def _reading(comparisons: Sequence[Comparison], reading: str) -> Section:
    known = any(reading in one.measured for one in comparisons)
    return Section(
        title=reading.capitalize(),
        words=() if known else ("Not measured.",),
        figure=validation.figure(comparisons, reading) if known else None,
    )
