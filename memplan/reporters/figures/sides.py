"""The peaks of several fine-tunes, stacked by category, beside the card's line.

What is paged is left out: it decides nothing, since the driver moves it to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memplan.comparison import Side
from memplan.footprint import CATEGORIES
from memplan.reporters.figures import Figure, drawn, gib
from memplan.reporters.palette import LIGHT
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def figure(sides: Sequence[Side]) -> Figure:
    """A bar a fine-tune, in the order that they are given."""
    totals = {side.name: sum(_parts(side).values()) for side in sides}
    least = min(totals, key=lambda name: totals[name])
    return Figure(
        name="sides",
        title="What the peaks are made of",
        words=f"Peaks of {len(sides)} fine-tunes by category; {least} takes the least, "
        f"{format_bytes(totals[least])}.",
        svg=drawn(lambda axes: _draw(axes, sides), 1.7 + 0.34 * len(sides)),
    )


def _parts(side: Side) -> dict[str, int]:
    return {name: size for name, size in side.breakdown.items() if name != "paged"}


def _draw(axes: Axes, sides: Sequence[Side]) -> None:
    names = [side.name for side in sides]
    left = [0.0] * len(sides)
    for category in CATEGORIES:
        sizes = gib([_parts(side).get(category, 0) for side in sides])
        if not any(sizes):
            continue
        label = category.replace("_", " ")
        axes.barh(names, sizes, left=left, color=LIGHT[category], label=label)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(
            format_bytes(round(total * GIB)),
            (total, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    capacity_bytes = sides[0].footprint.capacity_bytes
    if capacity_bytes is not None:
        axes.axvline(capacity_bytes / GIB, color=LIGHT["line"], linewidth=1.4)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("GiB on the device" if capacity_bytes else "GiB reserved")
    axes.margins(x=0.16)
    axes.figure.legend(loc="outside lower center", ncols=4, handlelength=1.2)
