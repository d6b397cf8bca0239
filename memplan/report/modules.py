"""What a recipe makes of each linear layer: its adapter's rank and its bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memplan import quantizations
from memplan.estimator import Estimate
from memplan.estimator.layout import Role
from memplan.estimator.weights import DTYPE_BYTES
from memplan.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A linear layer of a model."""

    layer: int | None
    """Its position in the stack of layers; None outside of it."""
    module: str
    """Its path within the layer."""
    rank: int
    """Of its adapter; 0 without one."""
    bits: int
    """Of a stored weight, without the state of its blocks."""


def cells(estimate: Estimate) -> tuple[Cell, ...]:
    """Every linear layer of the main stack, then those outside of layers."""
    parts = estimate.parts
    return tuple(sorted(_cells(estimate), key=_place)) + tuple(
        _cell(role, None, parts.recipe) for role in parts.layout.outside
    )


def _cells(estimate: Estimate) -> Iterator[Cell]:
    parts = estimate.parts
    for group in parts.layout.groups:
        if group.block.stack != parts.architecture.main_stack:
            continue
        for layer in group.layers:
            for role in group.roles:
                yield _cell(role, layer, parts.recipe)


def _place(cell: Cell) -> int:
    return cell.layer or 0


def _cell(role: Role, layer: int | None, recipe: Recipe) -> Cell:
    bits = quantizations.find(recipe.quantization).bits if role.quantized else None
    return Cell(
        layer=layer,
        module=role.linear.path,
        rank=role.rank,
        bits=bits or 8 * DTYPE_BYTES[recipe.dtype],
    )
