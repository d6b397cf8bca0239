"""The longest sequence that fits, against the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.report import Report
from memplan.report.frontier import Reach
from memplan.reporters.figures import Figure, drawn
from memplan.reporters.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[int, int]


def figure(report: Report) -> Figure:
    """What lies below the line fits."""
    points = _points(report.reach)
    batch, length = points[0]
    return Figure(
        name="frontier",
        title="Longest sequence by batch",
        words=f"The longest sequence that fits: {length:,} tokens at batch {batch}, "
        f"{points[-1][1]:,} at batch {points[-1][0]}.",
        svg=drawn(lambda axes: _draw(axes, report, points)),
    )


def _points(reach: tuple[Reach, ...]) -> list[Point]:
    fitting = (one for one in reach if one.sequence_length)
    return [(one.batch_size, one.sequence_length or 0) for one in fitting]


def _draw(axes: Axes, report: Report, points: list[Point]) -> None:
    batches, lengths = zip(*points, strict=True)
    axes.plot(batches, lengths, color=LIGHT["weights"], marker="o", markersize=4)
    axes.fill_between(batches, lengths, color=LIGHT["weights"], alpha=0.12)
    for batch, length in points:
        axes.annotate(
            f"{length:,}",
            (batch, length),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    asked = (report.recipe.batch_size, report.recipe.sequence_length)
    axes.plot(*asked, color=LIGHT["line"], marker="D", linestyle="", label="the recipe")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(batches, map(str, batches))
    axes.set_yticks(_powers(lengths), [f"{one:,}" for one in _powers(lengths)])
    axes.set_xlabel("batch")
    axes.set_ylabel("tokens of a sequence")
    axes.minorticks_off()
    axes.margins(0.12)
    axes.legend(loc="lower left")


def _powers(lengths: tuple[int, ...]) -> list[int]:
    first, last = min(lengths).bit_length() - 1, max(lengths).bit_length()
    return [2**power for power in range(first, last + 1)]
