"""Memory over the step, stacked by category, with the card's line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report import Report
from memplan.report.course import INSIDE, Course
from memplan.reporters.figures import Figure, drawn, gib
from memplan.reporters.palette import LIGHT
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pair = tuple[float, float]


def title(report: Report) -> str:
    """What the picture is of."""
    return f"Memory {'over the step' if report.inference is None else 'to the answer'}"


def figure(report: Report) -> Figure:
    """Each moment takes the same width; within it, events from left to right."""
    peak = report.footprint.peak
    through = "adaptation and two steps" if report.inference is None else "the answers"
    return Figure(
        name="memory",
        title=title(report),
        words=f"Allocated memory by category through load and {through}; the most is "
        f"{format_bytes(peak.allocated_bytes)}, in {peak.label}.",
        svg=drawn(lambda axes: _draw(axes, report), 3.6, _EDGES),
    )


def _draw(axes: Axes, report: Report) -> None:
    course = report.course
    edges = _edges(course)
    points = [point for stretch in course for point in stretch.points]
    below = [0.0] * len(points)
    for name in INSIDE:
        sizes = gib([point.parts[name] for point in points])
        if not any(sizes):
            continue
        above = [low + size for low, size in zip(below, sizes, strict=True)]
        axes.stairs(
            above,
            edges,
            baseline=below,
            fill=True,
            color=LIGHT[name],
            label=name.replace("_", " "),
        )
        below = above
    reserved = gib([point.reserved_bytes for point in points])
    axes.stairs(reserved, edges, color=LIGHT["ink"], linewidth=1, label="reserved")
    _draw_card(axes, report)
    _name_moments(axes, course)
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0)
    axes.figure.legend(loc="lower center", ncols=4, **_COMPACT)


_EDGES = {"left": 0.13, "right": 0.98, "top": 0.93, "bottom": 0.39}
"""Of the axes, as shares of the picture: room for moments and the legend."""

_COMPACT: dict[str, Any] = {"handlelength": 1.2, "columnspacing": 1.2}


def _draw_card(axes: Axes, report: Report) -> None:
    gpu = report.gpu
    if gpu is None:
        return
    axes.axhline(gpu.budget_bytes / GIB, color=LIGHT["line"], linewidth=1.4)
    axes.annotate(
        f"{gpu.name}: {format_bytes(gpu.budget_bytes)} for torch",
        (0, gpu.budget_bytes / GIB),
        xycoords=("axes fraction", "data"),
        xytext=(3, 5),
        textcoords="offset points",
        ha="left",  # where the least is, so that no peak is hidden
        color=LIGHT["line"],
        fontsize=8,
        bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.5},
    )


def _edges(course: Course) -> list[float]:
    """Where each point begins, a moment being of width 1, and where the last ends."""
    edges: list[float] = []
    for place, stretch in enumerate(course):
        count = len(stretch.points)
        edges += [place + number / count for number in range(count)]
    return [*edges, float(len(course))]


def _name_moments(axes: Axes, course: Course) -> None:
    places = [place + 0.5 for place in range(len(course))]
    names = [stretch.moment for stretch in course]
    axes.set_xticks(places, names, rotation=35, ha="right")
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, len(course))
    for place in range(1, len(course)):
        axes.axvline(place, color=LIGHT["grid"], linewidth=0.6)
