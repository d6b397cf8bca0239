"""Predicted against measured bytes of one reading, a point a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from memplan.accuracy import Comparison
from memplan.reporters.figures import Figure, drawn
from memplan.reporters.palette import LIGHT, SERIES
from memplan.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP"
"""Shapes, by which the cards are told apart as well as by colour."""


def figure(comparisons: Sequence[Comparison], reading: str) -> Figure:
    """On the line, prediction and measurement are the same."""
    own = [one for one in comparisons if reading in one.measured]
    worst = max(own, key=lambda one: abs(one.errors[reading]))
    return Figure(
        name=f"validation-{reading}",
        title=f"Predicted against measured, {reading}",
        words=f"{len(own)} runs; the worst is off by {worst.errors[reading]:+.2%}.",
        svg=drawn(lambda axes: _draw(axes, own, reading), 3.6),
    )


def _draw(axes: Axes, own: Sequence[Comparison], reading: str) -> None:
    sizes = [size / GIB for one in own for size in _pair(one, reading)]
    ends = (min(sizes) * 0.8, max(sizes) * 1.25)
    axes.plot(ends, ends, color=LIGHT["quiet"], linewidth=0.8)
    cards = sorted({one.run.card for one in own})
    for card, colour, marker in zip(cards, cycle(SERIES), cycle(MARKERS), strict=False):
        points = [_pair(one, reading) for one in own if one.run.card == card]
        axes.plot(
            [measured / GIB for measured, _ in points],
            [predicted / GIB for _, predicted in points],
            color=LIGHT[colour],
            linestyle="",
            marker=marker,
            markersize=4,
            label=card,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured, GiB")
    axes.set_ylabel("predicted, GiB")
    axes.grid(visible=True, axis="both")
    axes.legend(loc="upper left")


def _pair(one: Comparison, reading: str) -> tuple[int, int]:
    return one.measured[reading], one.predicted[reading]
