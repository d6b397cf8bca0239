"""A measured run's moments beside what is predicted of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.footprint import Footprint
from memplan.reporters.figures import Figure, drawn, gib
from memplan.reporters.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def figure(measured: Footprint, predicted: Footprint) -> Figure:
    """Allocated peaks of the moments that both know, as pairs of bars."""
    labels = shared(measured, predicted)
    return Figure(
        name="measured",
        title="Measured beside predicted",
        words=f"Allocated peaks of {len(labels)} moments, measured and predicted.",
        svg=drawn(lambda axes: _draw(axes, labels, measured, predicted)),
    )


def shared(measured: Footprint, predicted: Footprint) -> list[str]:
    """The moments that were measured and are predicted; 0 bytes were not read."""
    known = {moment.label for moment in predicted.moments}
    return [
        moment.label
        for moment in measured.moments
        if moment.label in known and moment.allocated_bytes
    ]


def _draw(
    axes: Axes, labels: list[str], measured: Footprint, predicted: Footprint
) -> None:
    sides = ((measured, "weights", "measured"), (predicted, "activations", "predicted"))
    for number, (footprint, colour, name) in enumerate(sides):
        sizes = {one.label: one.allocated_bytes for one in footprint.moments}
        axes.bar(
            [place + 0.4 * number for place in range(len(labels))],
            gib([sizes[label] for label in labels]),
            width=0.38,
            color=LIGHT[colour],
            label=name,
        )
    places = [place + 0.2 for place in range(len(labels))]
    axes.set_xticks(places, labels, rotation=35, ha="right")
    axes.set_ylabel("GiB allocated")
    axes.figure.legend(loc="outside lower center", ncols=2)
