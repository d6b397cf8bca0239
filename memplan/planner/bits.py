"""Which layers to leave unquantised, where ranks leave memory: those it helps most.

Quantising costs a layer ||W - Q(W)||^2, which no rank's worth can be added to, so bits
come after ranks: what these leave free is spent on the error, by a knapsack of two
choices a group. The trainers load one scheme and a list of modules that it passes over,
so these are the mixes that can be exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memplan.planner.choices import Estimate, excess_bytes
from memplan.planner.modules import Group
from memplan.planner.ranks import allocated
from memplan.planner.solver import Problem, solve_milp
from memplan.planner.value import quantization_error
from memplan.planner.value.quantization_error import UNQUANTIZED
from memplan.recipe import Recipe

MOST_TIGHTENINGS = 6
"""Times that the budget is tightened before every layer stays quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BitSearch:
    """The layers to spare, of a recipe that is settled but for these."""

    recipe: Recipe
    groups: tuple[Group, ...]
    estimate: Estimate
    budget_bytes: int
    errors: Mapping[str, float]

    def run(self) -> Recipe:
        """The recipe with the least error within the budget."""
        posed = self._pose()
        for _ in range(MOST_TIGHTENINGS):
            solution = solve_milp(posed)
            if solution.choices is None:
                return self.recipe
            recipe = self._spared(solution.choices)
            excess = excess_bytes(self.estimate(recipe), self.budget_bytes)
            if excess <= 0:
                return recipe
            posed = posed.with_free_bytes(posed.free_bytes - excess)
        return self.recipe

    def _pose(self) -> Problem:
        """What sparing a group adds to every moment is asked of the estimate."""
        quantized = self.estimate(self.recipe)
        labels = [moment.label for moment in quantized.moments]
        base = allocated(quantized, labels)
        num_bytes = np.zeros((len(labels), len(self.groups), 2), dtype=np.int64)
        for row, one in enumerate(self.groups):
            spared = self.estimate(
                quantization_error.with_spared(self.recipe, one.paths)
            )
            added = allocated(spared, labels) - base
            num_bytes[:, row, UNQUANTIZED] = np.maximum(added, 0)
        reserved = [moment.reserved_bytes for moment in quantized.moments]
        paths = [one.paths for one in self.groups]
        return Problem(
            costs=np.array(quantization_error.losses(self.errors, paths)),
            num_bytes=num_bytes,
            free_bytes=self.budget_bytes - np.array(reserved, dtype=np.int64),
        )

    def _spared(self, choices: tuple[int, ...]) -> Recipe:
        paths = [
            path
            for one, choice in zip(self.groups, choices, strict=True)
            if choice == UNQUANTIZED
            for path in one.paths
        ]
        return (
            quantization_error.with_spared(self.recipe, paths) if paths else self.recipe
        )
