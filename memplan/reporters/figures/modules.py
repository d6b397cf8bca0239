"""Ranks and bits of every linear layer, as a grid of layers by modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memplan.report import Report
from memplan.report.modules import Cell
from memplan.reporters.figures import Figure, drawn
from memplan.reporters.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALE, FULL = 0.12, 1.0
"""Shares of colour that the smallest and the largest rank are drawn with."""


def figure(report: Report) -> Figure:
    """Lightness tells the rank; the name of a module says its bits."""
    cells = [cell for cell in report.cells if cell.layer is not None]
    modules = list(dict.fromkeys(cell.module for cell in cells))
    ranks = sorted({cell.rank for cell in cells if cell.rank})
    told = f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no adapters"
    return Figure(
        name="layers",
        title="Ranks and bits by layer",
        words=f"{len(modules)} linear layers in each of the model's layers, {told}.",
        svg=drawn(lambda axes: _draw(axes, cells, modules), 0.9 + 0.24 * len(modules)),
    )


def _draw(axes: Axes, cells: list[Cell], modules: list[str]) -> None:
    from matplotlib.patches import Patch

    most = max((cell.rank for cell in cells), default=1) or 1
    for row, module in enumerate(modules):
        own = [cell for cell in cells if cell.module == module]
        for rank, first, last in _stretches(own):
            colour = _shade(rank, most)
            width = last - first + 1
            axes.barh(row, width, left=first, align="center", height=0.86, color=colour)
    axes.set_yticks(range(len(modules)), [_name(one, cells) for one in modules])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("layer")
    axes.set_xlim(0, 1 + max((cell.layer or 0 for cell in cells), default=0))
    ranks = sorted({cell.rank for cell in cells})
    axes.figure.legend(
        handles=[
            Patch(color=_shade(rank, most), label=f"rank {rank}" if rank else "frozen")
            for rank in ranks
        ],
        loc="outside upper right",
        ncols=6,
        handlelength=1.2,
    )


def _stretches(cells: list[Cell]) -> Iterator[tuple[int, int, int]]:
    """Layers in a row of one rank: the rank, the first and the last of them."""
    first = last = cells[0].layer or 0
    rank = cells[0].rank
    for cell in cells[1:]:
        layer = cell.layer or 0
        if (cell.rank, layer) != (rank, last + 1):
            yield rank, first, last
            rank, first = cell.rank, layer
        last = layer
    yield rank, first, last


def _name(module: str, cells: list[Cell]) -> str:
    bits = sorted({cell.bits for cell in cells if cell.module == module})
    return f"{module.rpartition('.')[2]}, {' or '.join(map(str, bits))} bits"


def _shade(rank: int, most: int) -> str:
    """From pale to the full colour by rank; a frozen layer is grey."""
    from matplotlib.colors import to_hex, to_rgb

    if not rank:
        return LIGHT["grid"]
    share = PALE + (FULL - PALE) * (rank / most) ** 0.5
    paper, full = to_rgb(LIGHT["paper"]), to_rgb(LIGHT["adapters"])
    red, green, blue = (p + share * (f - p) for p, f in zip(paper, full, strict=True))
    return str(to_hex((red, green, blue)))
