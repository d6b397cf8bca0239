"""The peak by category, as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.report import Report
from memplan.reporters.figures import Figure, drawn, gib
from memplan.reporters.palette import LIGHT
from memplan.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def figure(report: Report) -> Figure:
    """A bar a term, with its bytes."""
    terms = report.terms
    largest = max(terms, key=lambda term: term.num_bytes)
    return Figure(
        name="breakdown",
        title="What the peak is made of",
        words=f"Bytes at the peak by category; {largest.name.replace('_', ' ')} take "
        f"the most, {format_bytes(largest.num_bytes)}.",
        svg=drawn(lambda axes: _draw(axes, report), 0.6 + 0.26 * len(terms)),
    )


def _draw(axes: Axes, report: Report) -> None:
    terms = report.terms
    sizes = gib([term.num_bytes for term in terms])
    names = [term.name.replace("_", " ") for term in terms]
    bars = axes.barh(names, sizes, color=[LIGHT[term.name] for term in terms])
    labels = [format_bytes(term.num_bytes) for term in terms]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("GiB")
    axes.margins(x=0.2)
