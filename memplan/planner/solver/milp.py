"""The knapsack as a mixed-integer program, by HiGHS through scipy.

x[i, c] in {0, 1}                              module i takes choice c
sum_c x[i, c] = 1                              every module takes one
sum_{i, c} bytes[p, i, c] x[i, c] <= free[p]   no moment is exceeded
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from memplan.planner.solver.lagrangian import solve_lagrangian
from memplan.planner.solver.problem import Floats, Integers, Problem, Solution, Status
from memplan.units import MIB

DEFAULT_GAP = 1e-4
DEFAULT_SECONDS = 10.0

_OUT_OF_TIME = 1
_INFEASIBLE = 2
"""Values of `OptimizeResult.status` (scipy.optimize.milp)."""


def solve_milp(
    problem: Problem,
    *,
    gap: float = DEFAULT_GAP,
    time_limit: float = DEFAULT_SECONDS,
    start: Solution | None = None,
) -> Solution:
    """The choices of the least cost, proven within the gap or until time is up.

    `start` is the Lagrangian's solution where it is known: its bound and prices stand,
    and its choices where nothing cheaper is found.
    """
    began = time.perf_counter()
    known = start or solve_lagrangian(problem)
    if known.status in (Status.OPTIMAL, Status.INFEASIBLE):
        return _named(known, known.status, began)
    if known.gap <= gap:
        return _named(known, Status.WITHIN_GAP, began)
    result = _run(problem, gap, time_limit)
    if result.status == _INFEASIBLE and known.choices is None:
        return _named(known, Status.INFEASIBLE, began, dual_bound=math.inf)
    best = known
    found = _rounded(problem, result.x)
    if found is not None:
        best = _replaced(problem, known, found, problem.cost_of(found))
    best = _bounded(best, result)
    return _named(best, _status(best, gap), began)


def solve_minimax(
    problem: Problem,
    costs: Sequence[Floats],
    start: Solution,
    gap: float = DEFAULT_GAP,
    time_limit: float = DEFAULT_SECONDS,
) -> Solution:
    """The choices that fit whose largest cost, of several, is least.

    Minimises t subject to sum_{i, c} costs[k][i, c] x[i, c] <= t for every k. `start`
    is a solution whose objective is its largest cost.
    """
    began = time.perf_counter()
    result = _run(problem, gap, time_limit, costs)
    best = start
    found = _rounded(problem, None if result.x is None else result.x[:-1])
    if found is not None:
        rows = np.arange(len(found))
        largest = max(float(cost[rows, found].sum()) for cost in costs)
        best = _replaced(problem, start, found, largest)
    best = _bounded(best, result)
    return _named(best, _status(best, gap), began)


def _run(
    problem: Problem, gap: float, time_limit: float, largest: Sequence[Floats] = ()
) -> Any:
    """What scipy says of the program; bytes are MiB, so that numbers are near 1.

    With `largest`, one more variable is minimised, which each of these costs is below.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    modules, choices = np.nonzero(problem.exists)
    count, extra = len(modules), 1 if largest else 0
    takes_one = np.zeros((len(problem.costs), count + extra))
    takes_one[modules, np.arange(count)] = 1
    held = np.zeros((len(problem.free_bytes), count + extra))
    held[:, :count] = problem.num_bytes[:, modules, choices] / MIB
    constraints = [
        LinearConstraint(csr_array(takes_one), 1, 1),
        LinearConstraint(csr_array(held), -np.inf, problem.free_bytes / MIB),
    ]
    objective = problem.costs[modules, choices]
    if largest:
        objective = np.append(np.zeros(count), 1.0)
        regrets = [np.append(cost[modules, choices], -1.0) for cost in largest]
        constraints.append(LinearConstraint(np.array(regrets), -np.inf, 0))
    free = np.append(np.ones(count), [np.inf] * extra)
    with silenced_stdout():
        return milp(
            objective,
            integrality=np.append(np.ones(count), [0] * extra),
            bounds=Bounds(np.append(np.zeros(count), [-np.inf] * extra), free),
            constraints=constraints,
            options={"mip_rel_gap": gap, "time_limit": time_limit},
        )


def _rounded(problem: Problem, values: Floats | None) -> Integers | None:
    """Each module's choice; None where there are none, or where bytes are exceeded.

    HiGHS keeps rows to a tolerance, and a budget is kept to the byte.
    """
    if values is None:
        return None
    taken = np.full(problem.costs.shape, -1.0)
    taken[problem.exists] = values
    choices: Integers = taken.argmax(axis=1)
    return choices if problem.fits(choices) else None


def _replaced(
    problem: Problem, known: Solution, found: Integers, objective: float
) -> Solution:
    """The known solution with the choices found, where these are better."""
    if objective >= known.objective:
        return known
    return dataclasses.replace(
        known,
        choices=tuple(map(int, found)),
        objective=objective,
        used_bytes=tuple(map(int, problem.bytes_of(found))),
    )


def _bounded(solution: Solution, result: Any) -> Solution:
    """The solution with HiGHS's bound, where that is better than its own."""
    if result.mip_dual_bound is None:
        return solution
    bound = max(solution.dual_bound, float(result.mip_dual_bound))
    return dataclasses.replace(solution, dual_bound=min(bound, solution.objective))


def _status(solution: Solution, gap: float) -> Status:
    if solution.choices is None:
        return Status.UNSOLVED
    if solution.gap == 0.0:
        return Status.OPTIMAL
    return Status.WITHIN_GAP if solution.gap <= gap else Status.HEURISTIC


def _named(
    solution: Solution, status: Status, began: float, **changes: Any
) -> Solution:
    seconds = time.perf_counter() - began
    return dataclasses.replace(
        solution, solver="milp", status=status, seconds=seconds, **changes
    )


@contextlib.contextmanager
def silenced_stdout() -> Iterator[None]:
    """Drops what C code writes to standard output, which HiGHS does unasked.

    The descriptor itself is turned away, and C's buffer is emptied before it comes
    back. Without a standard output there is nothing to keep clean.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 1)
            yield
            _flush_c()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _flush_c() -> None:
    """Empties the buffers of C's streams, where the C library can be asked."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)
