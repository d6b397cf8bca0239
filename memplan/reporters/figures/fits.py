"""What fits, models by ways, as a heat map of what is left of the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memplan.fits import Answer, Way
from memplan.gpu import Gpu
from memplan.reporters.figures import Figure, drawn
from memplan.reporters.palette import LIGHT
from memplan.units import GIB, format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_MODELS = 40

STEPS = ((0.0, 0.25), (0.1, 0.5), (0.3, 0.75), (0.6, 1.0))
"""Shares of the card left from which a colour is so full."""

Rows = Mapping[str, Mapping[Way, Answer]]


def figure(answers: Sequence[Answer], ways: Sequence[Way], gpu: Gpu) -> Figure:
    """Models that fit in any way; a cell has the GiB to spare."""
    fitting = fitting_in_any(answers)
    rows = _spread(fitting)
    return Figure(
        name="fits",
        title="What fits",
        words=f"{len(rows)} of the {len(fitting)} models that fit on {gpu.name} in "
        "some way; a number is the GiB to spare, an empty cell does not fit.",
        svg=drawn(lambda axes: _draw(axes, rows, ways, gpu), 1.2 + 0.19 * len(rows)),
    )


def fitting_in_any(answers: Sequence[Answer]) -> Rows:
    """Answers by model and way, of the models that fit in any way, largest first."""
    rows: dict[str, dict[Way, Answer]] = {}
    for one in sorted(answers, key=lambda one: -one.architecture.total_parameters):
        rows.setdefault(one.architecture.name, {})[one.way] = one
    return {
        name: own for name, own in rows.items() if any(one.fits for one in own.values())
    }


def _spread(rows: Rows) -> Rows:
    """MOST_MODELS of the rows at most, evenly from the largest to the smallest."""
    names = list(rows)
    if len(names) <= MOST_MODELS:
        return rows
    step = (len(names) - 1) / (MOST_MODELS - 1)
    kept = (names[round(place * step)] for place in range(MOST_MODELS))
    return {name: rows[name] for name in kept}


def _draw(axes: Axes, rows: Rows, ways: Sequence[Way], gpu: Gpu) -> None:
    for row, own in enumerate(rows.values()):
        for column, way in enumerate(ways):
            answer = own.get(way)
            if answer is None or answer.margin_bytes is None or not answer.fits:
                continue
            fullness = _fullness(answer.margin_bytes / gpu.budget_bytes)
            colour, ink = LIGHT["adapters"], LIGHT["ink" if fullness < 1 else "paper"]
            axes.barh(
                row,
                0.96,
                left=column,
                align="center",
                height=0.9,
                color=colour,
                alpha=0.75 * fullness if fullness < 1 else 1,
            )
            axes.text(
                column + 0.48,
                row,
                f"{answer.margin_bytes / GIB:.1f}",
                ha="center",
                va="center",
                fontsize=7,
                color=ink,
            )
    axes.set_yticks(range(len(rows)), list(map(_name, rows.values())), fontsize=7)
    places = [place + 0.1 for place in range(len(ways))]
    axes.set_xticks(places, [way.name for way in ways], rotation=12, ha="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xlim(0, len(ways))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _name(own: Mapping[Way, Answer]) -> str:
    architecture = next(iter(own.values())).architecture
    last = architecture.name.rpartition("/")[2]
    return f"{last}, {format_count(architecture.total_parameters)}"


def _fullness(share: float) -> float:
    return max(fullness for least, fullness in STEPS if share >= least)
