"""`Problem` and `Solution`: the knapsack as it is posed, and what was found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memplan.units import GIB

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SMALLEST_GAP = 1e-9
"""Objectives that are closer than this, relative to their size, are the same."""


class Status(StrEnum):
    """How much is known of a solution."""

    OPTIMAL = "optimal"
    """Nothing cheaper exists."""
    WITHIN_GAP = "within_gap"
    """Nothing exists that is cheaper by more than the gap that was asked for."""
    HEURISTIC = "heuristic"
    """It fits; its gap is what is proven of it."""
    INFEASIBLE = "infeasible"
    """No choice of every module fits."""
    UNSOLVED = "unsolved"
    """Nothing was found that fits, nor proven that nothing does."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """The costs and bytes of every module's choices, and the bytes that are free."""

    costs: Floats
    """(modules, choices); infinite for a choice that a module does not have."""
    num_bytes: Integers
    """(moments, modules, choices)."""
    free_bytes: Integers
    """(moments,): the budget less what no choice changes; may be negative."""

    @classmethod
    def of(
        cls,
        costs: Sequence[Sequence[float]],
        num_bytes: Sequence[Sequence[Sequence[int]]],
        free_bytes: Sequence[int],
    ) -> Problem:
        """The problem of nested sequences."""
        return cls(
            costs=np.asarray(costs, dtype=np.float64),
            num_bytes=np.asarray(num_bytes, dtype=np.int64),
            free_bytes=np.asarray(free_bytes, dtype=np.int64),
        )

    @property
    def exists(self) -> NDArray[np.bool_]:
        """(modules, choices): which choices there are."""
        return np.isfinite(self.costs)

    def cost_of(self, choices: Integers) -> float:
        """The cost of one choice a module."""
        return float(self.costs[np.arange(len(choices)), choices].sum())

    def bytes_of(self, choices: Integers) -> Integers:
        """(moments,): the bytes of one choice a module."""
        used: Integers = self.num_bytes[:, np.arange(len(choices)), choices].sum(axis=1)
        return used

    def fits(self, choices: Integers) -> bool:
        """Whether the choices are within every moment's bytes, counted in integers."""
        return bool((self.bytes_of(choices) <= self.free_bytes).all())

    def smallest_bytes(self) -> Integers:
        """(moments,): the least that each moment takes, whatever is chosen."""
        most = np.iinfo(np.int64).max
        held = np.where(self.exists, self.num_bytes, most)
        smallest: Integers = held.min(axis=2).sum(axis=1)
        return smallest

    def with_costs(self, costs: Floats) -> Problem:
        """The same choices at other costs."""
        return dataclasses.replace(self, costs=costs)

    def with_free_bytes(self, free_bytes: Integers) -> Problem:
        """The same choices within other budgets."""
        return dataclasses.replace(self, free_bytes=free_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """One choice a module, and what is proven of it."""

    solver: str
    status: Status
    choices: tuple[int, ...] | None
    """The index of each module's choice; None where none was found."""
    objective: float
    """The cost; infinite where no choices were found."""
    dual_bound: float
    """No choices that fit cost less."""
    prices: tuple[float, ...]
    """(moments,): cost that one more byte of each moment would save at the margin."""
    used_bytes: tuple[int, ...]
    """(moments,): what the choices take; empty where there are none."""
    seconds: float

    @property
    def gap(self) -> float:
        """How much cheaper the best could be at most, as a share of the objective."""
        return relative_gap(self.objective, self.dual_bound)

    @property
    def price_of_gib(self) -> float:
        """Cost that one GiB more in every moment would save at the margin."""
        return sum(self.prices) * GIB

    def to_json(self) -> dict[str, Any]:
        """What a plan says of the solution; what is not finite is null."""
        return {
            "solver": self.solver,
            "status": str(self.status),
            "objective": _finite(self.objective),
            "dual_bound": _finite(self.dual_bound),
            "gap": _finite(self.gap),
            "price_of_gib": _finite(self.price_of_gib),
            "seconds": self.seconds,
        }


def relative_gap(objective: float, dual_bound: float) -> float:
    """(objective - bound) / |objective|, and 0 where the bound is reached.

    As HiGHS defines it (`mip_rel_gap`).
    """
    if not math.isfinite(objective):
        return math.inf
    distance = max(0.0, objective - dual_bound)
    if distance <= SMALLEST_GAP * max(1.0, abs(objective)):
        return 0.0
    return distance / abs(objective) if objective else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
