"""Figures of reports, one file a picture, drawn by matplotlib as SVG.

Text stays text, and the same numbers give the same bytes. A figure is drawn in the
light theme's colours; a page puts its own theme's in their place.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memplan.reporters.palette import LIGHT
from memplan.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES = 5.0

STYLE: Any = {
    "axes.edgecolor": LIGHT["quiet"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": LIGHT["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": LIGHT["paper"],
    "font.family": ["sans-serif"],
    "font.size": 9,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.facecolor": LIGHT["paper"],
    "svg.fonttype": "none",
    "svg.hashsalt": "memplan",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["quiet"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.color": LIGHT["quiet"],
    "ytick.labelcolor": LIGHT["ink"],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture, and what it says for those who do not see it."""

    name: str
    title: str
    words: str
    svg: str


def drawn(
    draw: Callable[[Axes], None],
    height_inches: float = 3.0,
    edges: Mapping[str, float] | None = None,
) -> str:
    """What a function draws on axes, as SVG without a prolog.

    Where the axes' edges are not given, they are made to fit, which draws twice.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(STYLE):
        layout: Any = None if edges else "constrained"
        canvas = Canvas(figsize=(WIDTH_INCHES, height_inches), layout=layout)
        FigureCanvasSVG(canvas)
        draw(canvas.add_subplot())
        if edges:
            canvas.subplots_adjust(**edges)
        told = io.StringIO()
        canvas.savefig(told, format="svg", metadata=_NO_METADATA)
    return _shorn(told.getvalue())


def gib(sizes: Sequence[int]) -> list[float]:
    """Bytes in GiB, for an axis."""
    return [size / GIB for size in sizes]


_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def _shorn(svg: str) -> str:
    """The element alone, with coordinates to a hundredth and a family every page has.

    Matplotlib writes six digits, which double the file and which no screen shows.
    """
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(\d+\.\d{2})\d+", r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
