"""The ranks that no prior regrets much.

    minimise  max_k (cost_k(x) - best_k) / (worst_k - best_k)

over what fits: best_k is what prior k would reach within the budget by itself and
worst_k what it thinks of the fewest bytes, so a regret is the share that is forgone of
what the budget can gain. For weights w >= 0 that sum to 1, the weighted regret is a
cost like any other, and its bound is one of the maximum's (minimax).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memplan.planner.solver import Problem, Solution, Status, solve_lagrangian
from memplan.planner.solver.milp import DEFAULT_GAP, DEFAULT_SECONDS, solve_minimax
from memplan.planner.solver.problem import Floats, Integers, relative_gap

MOST_ROUNDS = 40
"""Changes of the weights; the bound moves little after a dozen."""

STEP = 2.0
"""How far the weights turn to a prior for its regret, in the first round."""

LEAST_REGRET = 1e-3
"""A largest regret below this is none: it is a thousandth of what can be gained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Robust:
    """The solution, and what each prior regrets of it."""

    solution: Solution
    """Its objective is the largest regret."""
    regrets: Mapping[str, float]


def solve_robust(
    problem: Problem,
    costs: Mapping[str, Floats],
    *,
    exact: bool = False,
    time_limit: float = DEFAULT_SECONDS,
) -> Robust:
    """The choices that fit whose largest regret is least; `costs` are by prior.

    The costs of the problem itself are not read. `exact` asks HiGHS, too.
    """
    began = time.perf_counter()
    alone = [solve_lagrangian(problem.with_costs(cost)) for cost in costs.values()]
    failed = [one for one in alone if one.choices is None]
    if failed:
        return Robust(solution=failed[0], regrets={})
    regrets = _regrets(problem, list(costs.values()), alone)
    found = _search(problem, regrets, alone)
    if exact and found.objective > LEAST_REGRET:
        found = solve_minimax(problem, regrets, found, DEFAULT_GAP, time_limit)
    seconds = time.perf_counter() - began
    taken = np.array(found.choices)
    values = (float(_total(regret, taken)) for regret in regrets)
    return Robust(
        solution=dataclasses.replace(found, seconds=seconds),
        regrets=dict(zip(costs, values, strict=True)),
    )


def _regrets(
    problem: Problem, costs: list[Floats], alone: list[Solution]
) -> list[Floats]:
    """(modules, choices) by prior, whose sum over the choices is the regret."""
    fewest = np.where(problem.exists, problem.num_bytes.sum(axis=0), np.inf)
    smallest = fewest.argmin(axis=1)
    regrets = []
    for cost, best in zip(costs, alone, strict=True):
        spread = _total(cost, smallest) - best.objective
        scale = spread if spread > 0 else 1.0
        regrets.append((cost - best.objective / len(cost)) / scale)
    return regrets


def _search(problem: Problem, regrets: list[Floats], alone: list[Solution]) -> Solution:
    """The best found by turning the weights to whoever regrets the most."""
    best = min(alone, key=lambda one: _largest(regrets, one))
    best = dataclasses.replace(
        best, objective=_largest(regrets, best), dual_bound=-math.inf
    )
    logs = np.zeros(len(regrets))
    for turn in range(MOST_ROUNDS):
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        weighted: Floats = sum(w * r for w, r in zip(weights, regrets, strict=True))
        found = solve_lagrangian(problem.with_costs(weighted))
        if found.choices is None:
            break
        best = _kept(best, found, _largest(regrets, found))
        if relative_gap(best.objective, best.dual_bound) <= DEFAULT_GAP:
            break
        taken = np.array(found.choices)
        values = np.array([_total(regret, taken) for regret in regrets])
        logs += STEP / (1 + turn) ** 0.5 * (values - values.max()) / _size(values)
    status = Status.OPTIMAL if best.gap == 0 else Status.HEURISTIC
    return dataclasses.replace(best, status=status)


def _kept(best: Solution, found: Solution, objective: float) -> Solution:
    """The better of two, with the better of their bounds."""
    bound = max(best.dual_bound, found.dual_bound)
    if found.dual_bound > best.dual_bound:
        best = dataclasses.replace(best, prices=found.prices)
    if objective < best.objective:
        best = dataclasses.replace(
            best,
            choices=found.choices,
            used_bytes=found.used_bytes,
            objective=objective,
        )
    return dataclasses.replace(best, dual_bound=bound)


def _largest(regrets: list[Floats], solution: Solution) -> float:
    taken = np.array(solution.choices)
    return max(_total(regret, taken) for regret in regrets)


def _total(cost: Floats, choices: Integers) -> float:
    return float(cost[np.arange(len(choices)), choices].sum())


def _size(values: Floats) -> float:
    """The spread of the values, for steps that do not depend on their unit."""
    return max(float(np.ptp(values)), 1e-12)
