"""What each change of one knob saves, as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.planner.why_not import Change
from memplan.report import Report
from memplan.reporters.figures import Figure, drawn, gib
from memplan.reporters.palette import LIGHT
from memplan.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def figure(report: Report) -> Figure:
    """What saves anything; where nothing does, what each change would take."""
    every = report.levers.changes
    changes = tuple(one for one in every if one.saved_bytes > 0) or every
    first = changes[0]
    return Figure(
        name="levers",
        title="What a change would save",
        words=f"{name(first)} saves the most, {format_bytes(first.saved_bytes)}.",
        svg=drawn(lambda axes: _draw(axes, changes), 0.7 + 0.26 * len(changes)),
    )


def name(change: Change) -> str:
    """The keys that change, and to what."""
    return ", ".join(
        f"{key.replace('_', ' ')} {_shown(value)}"
        for key, value in change.changes.items()
    )


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _draw(axes: Axes, changes: tuple[Change, ...]) -> None:
    sizes = gib([one.saved_bytes for one in changes])
    colours = [LIGHT["good" if one.saved_bytes > 0 else "bad"] for one in changes]
    bars = axes.barh([name(one) for one in changes], sizes, color=colours)
    labels = [format_bytes(one.saved_bytes) for one in changes]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=LIGHT["quiet"], linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("GiB saved of the reserved peak")
    axes.margins(x=0.28)
