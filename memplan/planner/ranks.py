"""The ranks within a recipe: bytes by asking the estimate, worth by the priors.

What a choice takes is the difference that it makes to the estimate, in every moment, so
there is no second account of bytes that could drift from the first. Differences need
not add up to the byte, so the estimate has the last word: where the chosen ranks exceed
the budget, the budget of the knapsack shrinks by as much, and it is solved again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memplan.architecture import Linear
from memplan.footprint import Footprint
from memplan.planner.choices import Estimate, excess_bytes
from memplan.planner.modules import Group, with_ranks
from memplan.planner.solver import Problem, Solution, solve_lagrangian, solve_milp
from memplan.planner.solver.problem import Floats, Integers
from memplan.planner.value import explained_variance, priors
from memplan.planner.value.robust import solve_robust
from memplan.recipe import Recipe
from memplan.values import Values

ROBUST = "robust"
"""All priors at once."""

EXPLAINED_VARIANCE = "explained-variance"
"""What measured values say, in the place of priors."""

DEFAULT_PRIOR = "per-parameter"
"""Equal ranks, as far as bytes allow: what reports/benchmark_ranks.md leads to, by the
rule of its `default_prior`. There all others were worse at equal bytes but mlp-first,
whose gain, -0.0055 +- 0.0030 nats a byte, is not shown to be a tenth of what halving
every rank costs (+0.0352)."""

MOST_TIGHTENINGS = 6
"""Times that the budget is tightened before the smallest ranks are taken."""

QUALITY_TOLERANCE = 0.1
"""The share of the adapters' worth within which ranks count as alike, which is as much
as the priors know: rank 128 and a rank of 40 everywhere are that far apart."""

HALVINGS = 7
"""Halvings of the budget in the search for the knee: to a hundredth of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """A recipe with its ranks, and what is proven of them."""

    recipe: Recipe
    footprint: Footprint
    ranks: Mapping[str, int]
    """By the paths of the modules."""
    solution: Solution
    regrets: Mapping[str, float]
    """By prior: the share that is forgone of what the budget can gain."""

    @property
    def slack(self) -> bool:
        """Whether memory binds no rank: it is not the bottleneck."""
        return not any(self.solution.prices)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSearch:
    """The ranks of a recipe whose other knobs are settled."""

    recipe: Recipe
    groups: tuple[Group, ...]
    estimate: Estimate
    budget_bytes: int
    """What the allocator may reserve, margin taken off."""
    ranks: tuple[int, ...]
    """The menu, the smallest first."""
    prior: str = DEFAULT_PRIOR
    values: Values | None = None
    """What EXPLAINED_VARIANCE goes by."""

    def run(self) -> Ranked | None:
        """The ranks that fit at the least loss, at the knee where memory is slack.

        None where not even the smallest ranks fit.
        """
        posed = self.pose()
        found = self._within(posed)
        if found is None or not found.slack:
            return found
        return self._at_the_knee(posed, found)

    def pose(self) -> Problem:
        """The knapsack; its costs are still zero.

        Free in a moment is the budget less what the allocator reserves there at the
        smallest ranks; a choice takes what it adds to the allocated bytes.
        """
        smallest = self.estimate(self._with({}))
        labels = [moment.label for moment in smallest.moments]
        base = allocated(smallest, labels)
        shape = (len(labels), len(self.groups), len(self.ranks))
        num_bytes = np.zeros(shape, dtype=np.int64)
        for row, one in enumerate(self.groups):
            for column, rank in enumerate(self.ranks[1:], start=1):
                probed = self.estimate(self._with({one.name: rank}))
                added = allocated(probed, labels) - base
                num_bytes[:, row, column] = np.maximum(added, 0)
        reserved = [moment.reserved_bytes for moment in smallest.moments]
        return Problem(
            costs=np.zeros(shape[1:]),
            num_bytes=num_bytes,
            free_bytes=self.budget_bytes - np.array(reserved, dtype=np.int64),
        )

    def _within(self, posed: Problem) -> Ranked | None:
        """The ranks whose estimate is within the budget."""
        for _ in range(MOST_TIGHTENINGS):
            solution, regrets = self._solved(posed, exact=True)
            if solution.choices is None:
                return None
            found = self._ranked(solution, regrets)
            excess = excess_bytes(found.footprint, self.budget_bytes)
            if excess <= 0:
                return found
            posed = posed.with_free_bytes(posed.free_bytes - excess)
        return None

    def _at_the_knee(self, posed: Problem, found: Ranked) -> Ranked:
        """Fewer bytes for nearly the same: the smallest share within the tolerance."""
        most_lost = self._lost_share(found.ranks) + QUALITY_TOLERANCE
        used = np.array(found.solution.used_bytes, dtype=np.float64)
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            choices = self._solved(_within_bytes(posed, used * share))[0].choices
            fits = choices is not None
            if fits and self._lost_share(self._spread(choices or ())) <= most_lost:
                high = share
            else:
                low = share
        solution, regrets = self._solved(_within_bytes(posed, used * high), exact=True)
        kept = dataclasses.replace(solution, prices=found.solution.prices)
        return self._ranked(kept, regrets)

    def _solved(
        self, problem: Problem, *, exact: bool = False
    ) -> tuple[Solution, Mapping[str, float]]:
        """The solution, and what each prior regrets of it; `exact` asks HiGHS, too."""
        if self.prior == ROBUST:
            by_prior = {n: losses(self.groups, self.ranks, n) for n in priors.names()}
            posed = problem.with_costs(by_prior[DEFAULT_PRIOR])
            robust = solve_robust(posed, by_prior, exact=exact)
            return robust.solution, robust.regrets
        solve = solve_milp if exact else solve_lagrangian
        return solve(problem.with_costs(self._losses())), {}

    def _losses(self) -> Floats:
        if self.prior != EXPLAINED_VARIANCE:
            return losses(self.groups, self.ranks, self.prior)
        assert self.values is not None
        return measured_losses(self.groups, self.ranks, self.values)

    def _ranked(self, solution: Solution, regrets: Mapping[str, float]) -> Ranked:
        ranks = self._spread(solution.choices or ())
        recipe = with_ranks(self.recipe, ranks)
        return Ranked(
            recipe=recipe,
            footprint=self.estimate(recipe),
            ranks=ranks,
            solution=solution,
            regrets=regrets,
        )

    def _spread(self, choices: Sequence[int]) -> dict[str, int]:
        return {
            path: self.ranks[choice]
            for one, choice in zip(self.groups, choices, strict=True)
            for path in one.paths
        }

    def _with(self, changed: Mapping[str, int]) -> Recipe:
        """The recipe with the smallest rank everywhere but where it is changed."""
        ranks = {
            path: changed.get(one.name, self.ranks[0])
            for one in self.groups
            for path in one.paths
        }
        return with_ranks(self.recipe, ranks)

    def _lost_share(self, ranks: Mapping[str, int]) -> float:
        """The share of the adapters' worth that is lost: as measured, if it was."""
        if self.prior != EXPLAINED_VARIANCE or self.values is None:
            return lost_share(self._linears(), ranks)
        spectra = self.values.spectra
        lost = (explained_variance.loss(spectra[p], rank) for p, rank in ranks.items())
        return sum(lost) / len(ranks)

    def _linears(self) -> dict[str, Linear]:
        return {
            path: linear
            for one in self.groups
            for path, linear in zip(one.paths, one.linears, strict=True)
        }


def menu(groups: Sequence[Group], ranks: Iterable[int], floor: int) -> tuple[int, ...]:
    """The ranks to choose from: no lower than the floor, none above every layer."""
    linears = [linear for one in groups for linear in one.linears]
    widest = max(min(one.in_features, one.out_features) for one in linears)
    found = {rank for rank in ranks if floor <= rank <= widest}
    return tuple(sorted(found | {floor}))


def losses(groups: Sequence[Group], ranks: Sequence[int], prior: str) -> Floats:
    """(groups, ranks): what each rank loses by a prior.

    Infinite for a rank above a layer's smaller side, the smallest rank excepted.
    """
    held = priors.find(prior)
    table = [
        [sum(held.loss(x, r) for x in one.linears) for r in ranks] for one in groups
    ]
    return _within_shapes(table, groups, ranks)


def measured_losses(
    groups: Sequence[Group], ranks: Sequence[int], values: Values
) -> Floats:
    """The same by what the layers' inputs were seen to be.

    Raises InputError where nothing was seen of a layer.
    """
    seen = values.of({path: None for one in groups for path in one.paths})
    paths = [one.paths for one in groups]
    table = explained_variance.losses(seen.spectra, paths, ranks)
    return _within_shapes(table, groups, ranks)


def _within_shapes(
    table: Sequence[Sequence[float]], groups: Sequence[Group], ranks: Sequence[int]
) -> Floats:
    """The losses, infinite where a layer is too small for a rank."""
    costs = np.array(table)
    for row, one in enumerate(groups):
        narrowest = min(min(x.in_features, x.out_features) for x in one.linears)
        costs[row, 1:][np.array(ranks[1:]) > narrowest] = np.inf
    return costs


def lost_share(linears: Mapping[str, Linear], ranks: Mapping[str, int]) -> float:
    """The share of the adapters' worth that is lost, by whichever prior says most.

    It is 1 without adapters and nears 0 for large ranks, whatever the recipe, so that
    recipes can be compared by it.
    """
    return max(_lost_share(linears, ranks, name) for name in priors.names())


def _lost_share(
    linears: Mapping[str, Linear], ranks: Mapping[str, int], prior: str
) -> float:
    held = priors.find(prior)
    whole = sum(held.weight(one) for one in linears.values())
    lost = sum(held.loss(one, ranks[path]) for path, one in linears.items())
    return lost / whole


def _within_bytes(problem: Problem, used: Floats) -> Problem:
    """The problem with so many bytes of each moment free."""
    return problem.with_free_bytes(used.astype(np.int64))


def allocated(footprint: Footprint, labels: Sequence[str]) -> Integers:
    """(moments,): allocated bytes at the moments of those labels."""
    by_label = {moment.label: moment.allocated_bytes for moment in footprint.moments}
    return np.array([by_label[label] for label in labels], dtype=np.int64)
