"""Predictions beside measurements: as a table, as Markdown, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.accuracy import (
    READINGS,
    UNEXPLAINED,
    Comparison,
    Difference,
    Explained,
    Group,
)
from memplan.errors import InputError
from memplan.profile import Profile
from memplan.reporters import terminal
from memplan.reporters.figures import STYLE, validation
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_FIELD = "--figure"

COLUMNS = (
    *("reading", "by", "measured by", "card", "method", "quantisation"),
    *("runs", "median", "signed", "worst"),
)
NUMBERS = COLUMNS[6:]
"""The columns that hold numbers."""

README_MARKS = ("<!-- accuracy -->", "<!-- /accuracy -->")
"""What the README's table of errors lies between."""


def report_validation(
    groups: Sequence[Group],
    comparisons: Sequence[Comparison],
    left_out: Mapping[str, str],
) -> None:
    """Prints the groups' errors, then every run, the worst first."""
    terminal.table(COLUMNS, [group_row(group) for group in groups], right=NUMBERS)
    terminal.say("")
    terminal.table(
        ("run", "by", *READINGS, "outcome", "predicted"),
        [run_row(each) for each in worst_first(comparisons)],
        right=READINGS,
    )
    for run, reason in left_out.items():
        terminal.say(f"Left out: {run}: {reason}")


def as_markdown(
    groups: Sequence[Group],
    comparisons: Sequence[Comparison],
    left_out: Mapping[str, str],
    picture: str = "",
) -> str:
    """The validation as Markdown."""
    lines = [_INTRODUCTION, *markdown_groups(groups), ""]
    if picture:
        lines += [f"![Predicted against measured]({picture})", ""]
    lines += ["## Every run, the worst first", "", *_markdown_runs(comparisons), ""]
    if left_out:
        lines += ["## Left out", ""]
        lines += [f"* {run}: {reason}" for run, reason in left_out.items()]
        lines.append("")
    return "\n".join(lines)


def markdown_groups(groups: Sequence[Group]) -> list[str]:
    """The table of errors that the README shows."""
    alignment = ["---"] * (len(COLUMNS) - len(NUMBERS)) + ["--:"] * len(NUMBERS)
    rows = [COLUMNS, tuple(alignment), *(group_row(group) for group in groups)]
    return [f"| {' | '.join(row)} |" for row in rows]


def draw(comparisons: Sequence[Comparison], file: Path) -> None:
    """Draws predicted against measured bytes into a picture.

    Raises InputError for a file that matplotlib cannot write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(READINGS), figsize=(12, 4.2))
        for axis, reading in zip(axes, READINGS, strict=True):
            _draw_reading(axis, reading, comparisons)
        figure.tight_layout()
        _save(figure, file)
        pyplot.close(figure)


def report_explanation(run: Profile, one: Explained) -> None:
    """Prints where a run differs from its prediction, and what would explain it."""
    way = one.comparison.way
    terminal.say(f"{run.id}: measured minus predicted ({way})", style="bold")
    terminal.table(
        ("of", "reading", "measured", "predicted", "difference", ""),
        [_difference_row(each) for each in one.differences],
        right=("measured", "predicted", "difference", ""),
    )
    error = one.comparison.errors.get("allocated")
    if error is None or abs(error) <= UNEXPLAINED:
        terminal.say(
            f"The allocated peak is within {UNEXPLAINED:.0%}: no reason sought."
        )
    elif not one.explanations:
        terminal.say("Nothing that was tried would halve the peak's difference.")
    for each in one.explanations:
        left = format_bytes(each.remaining_bytes)
        terminal.say(f"It would be explained if {each.what}: {left} would remain.")


def group_row(group: Group) -> tuple[str, ...]:
    """A group's cells, under COLUMNS."""
    return (
        group.reading,
        group.way,
        group.source,
        group.card,
        group.method,
        group.quantization,
        str(len(group.errors)),
        f"{group.median:.2%}",
        f"{group.bias:+.2%}",
        f"{group.worst:+.2%}",
    )


def run_row(each: Comparison) -> tuple[str, ...]:
    """A run's cells: its name, its way, READINGS, how it ended, the verdict."""
    cells = (_cell(each, reading) for reading in READINGS)
    return (each.run.id, each.way, *cells, each.run.outcome, _verdict(each))


def _cell(each: Comparison, reading: str) -> str:
    if reading not in each.measured:
        return ""
    sizes = (each.predicted[reading], each.measured[reading])
    told = " / ".join(f"{size / GIB:.3f}" for size in sizes)
    return f"{told}, {each.errors[reading]:+.2%}"


def _verdict(each: Comparison) -> str:
    return {True: "fits", False: "does not fit", None: ""}[each.predicted_fits]


def worst_first(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons, the largest error first."""
    return sorted(comparisons, key=lambda each: -each.worst)


def _markdown_runs(comparisons: Sequence[Comparison]) -> list[str]:
    lines = [
        "Cells hold predicted / measured GiB of 2^30 bytes, and the error.",
        "",
        "| run | by | allocated | reserved | device | outcome | predicted |",
        "|---|---|--:|--:|--:|---|---|",
    ]
    lines += [f"| {' | '.join(run_row(e))} |" for e in worst_first(comparisons)]
    return lines


def _draw_reading(axis: Any, reading: str, comparisons: Sequence[Comparison]) -> None:
    axis.set_title(reading)
    if any(reading in each.measured for each in comparisons):
        validation.draw(axis, comparisons, reading)
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)


def _save(figure: Figure, file: Path) -> None:
    metadata = {"Date": None} if file.suffix == ".svg" else None
    try:
        figure.savefig(file, metadata=metadata)
    except (OSError, ValueError) as error:
        raise InputError(
            FIGURE_FIELD,
            str(file),
            f"cannot be written ({error})",
            "name a .svg or .png file in a folder that exists",
        ) from error


def _difference_row(each: Difference) -> tuple[str, ...]:
    share = each.excess_bytes / each.measured_bytes if each.measured_bytes else 0.0
    return (
        each.what,
        each.reading,
        format_bytes(each.measured_bytes),
        format_bytes(each.predicted_bytes),
        format_bytes(each.excess_bytes),
        f"{share:+.2%}",
    )


_INTRODUCTION = """\
# Accuracy: measured runs and their predictions

Every run whose measurement memplan has, beside what it predicts for it. No prediction
reads a measurement, and nothing is fitted. Errors are (predicted - measured) /
measured: `median` is that of their sizes, `signed` the median with its sign, `worst`
the largest. Readings, sources, cards, methods and quantisations are never pooled. The
device's bytes are predicted with the CUDA context that the catalog plans for the card,
so that their error is that of the plan.

The [runs on a T4](accuracy_t4.md), [published runs](accuracy_published.md) and
[runs on a CPU](accuracy_cpu.md) have reports of their own, with bars and reasons. The
runs of `measure_grid` and of `memplan profile` on an H100 drew their weights on the
card, unless their names end in `pretrained`, while the prediction is of a load by
`from_pretrained`: [what that moves](histories_h100.md) is shown by the card's own
histories.

`memplan validate --markdown reports/accuracy.md --figure reports/accuracy.svg
--residuals profiles/residuals.json` writes this file, its picture, and the errors that
`simulate` shows beside a prediction.
"""
