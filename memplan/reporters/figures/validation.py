"""Predicted against measured bytes of one reading, a point a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from memplan.accuracy import Comparison
from memplan.reporters.figures import Figure, drawn
from memplan.reporters.palette import LIGHT, SERIES
from memplan.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP"
"""Shapes, by which the cards are told apart as well as by colour."""

RINGS = "simulate"
"""The way whose points are as large as the legend's."""

WAYS: Mapping[str, Mapping[str, Any]] = {
    RINGS: {"markersize": 6.5, "markerfacecolor": "none"},
    "estimate": {"markersize": 2.5},
}
"""A ring, and a dot that is seen within it, since both predict nearly the same."""


def figure(comparisons: Sequence[Comparison], reading: str) -> Figure:
    """On the line, prediction and measurement are the same."""
    own = [one for one in comparisons if reading in one.measured]
    worst = max(own, key=lambda one: abs(one.errors[reading]))
    num_runs = len({one.run.id for one in own})
    return Figure(
        name=f"validation-{reading}",
        title=f"Predicted against measured, {reading}",
        words=f"{num_runs} runs, rings simulated and dots estimated; the worst is off "
        f"by {worst.errors[reading]:+.2%}.",
        svg=drawn(lambda axes: draw(axes, comparisons, reading), 3.6),
    )


def draw(axes: Axes, comparisons: Sequence[Comparison], reading: str) -> None:
    """Draws those that have the reading; a card looks the same in every picture."""
    own = [one for one in comparisons if reading in one.measured]
    sizes = [size / GIB for one in own for size in _pair(one, reading)]
    ends = (min(sizes) * 0.8, max(sizes) * 1.25)
    axes.plot(ends, ends, color=LIGHT["quiet"], linewidth=0.8)
    cards = sorted({one.run.card for one in comparisons})
    for card, colour, marker in zip(cards, cycle(SERIES), cycle(MARKERS), strict=False):
        for way, style in WAYS.items():
            points = [
                _pair(one, reading)
                for one in own
                if (one.run.card, one.way) == (card, way)
            ]
            if points:
                axes.plot(
                    [measured / GIB for measured, _ in points],
                    [predicted / GIB for _, predicted in points],
                    color=LIGHT[colour],
                    linestyle="",
                    marker=marker,
                    label=card if way == RINGS else None,
                    **style,
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured, GiB")
    axes.set_ylabel("predicted, GiB (rings simulate, dots estimate)")
    axes.grid(visible=True, axis="both")
    # Points lie along the diagonal, and none in this corner.
    axes.legend(loc="upper left")


def _pair(one: Comparison, reading: str) -> tuple[int, int]:
    return one.measured[reading], one.predicted[reading]
