"""A plan's front: recipes that nothing beats, by memory and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.plan import Plan
from memplan.reporters.figures import Figure, drawn
from memplan.reporters.palette import LIGHT
from memplan.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def figure(plan: Plan) -> Figure:
    """Speed beside the plan's own; a point is as large as its sequence is long."""
    return Figure(
        name="front",
        title="Recipes that nothing beats",
        words=f"{len(plan.alternatives)} other recipes by reserved memory and speed, "
        "none of which another beats in memory, length, rank and speed at once.",
        svg=drawn(lambda axes: _draw(axes, plan)),
    )


def _draw(axes: Axes, plan: Plan) -> None:
    for one in plan.alternatives:
        spot = (one["reserved_bytes"] / GIB, one["speed"])
        axes.plot(*spot, color=LIGHT["weights"], marker="o", linestyle="", alpha=0.8)
        axes.annotate(
            f"{one['sequence_length']:,}, r {one['rank']}",
            spot,
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=7,
        )
    taken = plan.footprint.life_peak.reserved_bytes / GIB
    axes.plot(taken, 1, color=LIGHT["line"], marker="D", linestyle="", label="the plan")
    axes.axvline(plan.budget_bytes / GIB, color=LIGHT["line"], linewidth=1.2)
    axes.set_xlabel("GiB reserved; the line is the card's")
    axes.set_ylabel("speed beside the plan's")
    axes.margins(0.15)
    axes.legend(loc="best")
