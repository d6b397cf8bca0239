"""The knapsack: brute force, bounds in order, budgets kept to the byte."""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.planner.solver import Problem, Status, solve_lagrangian, solve_milp
from memplan.planner.solver.milp import silenced_stdout

SMALL_INSTANCES = 200
ROUNDING = 1e-9


def instance(seed: int, most_modules: int = 5) -> Problem:
    """Falling costs for rising bytes, in one to three moments; some do not fit."""
    random = np.random.default_rng(seed)
    modules = int(random.integers(1, most_modules + 1))
    choices, moments = int(random.integers(2, 5)), int(random.integers(1, 4))
    costs = np.sort(random.random((modules, choices)), axis=1)[:, ::-1]
    if choices > 2:
        costs[0, -1] = np.inf
    shape = (moments, modules, choices)
    num_bytes = 512 * np.sort(random.integers(0, 10**6, shape), axis=2)
    least, most = num_bytes.min(axis=2).sum(axis=1), num_bytes.max(axis=2).sum(axis=1)
    share = random.random(moments) * 1.1 - 0.05
    free = (least + (most - least) * share).astype(np.int64)
    return Problem(costs=costs.copy(), num_bytes=num_bytes, free_bytes=free)


def cheapest(problem: Problem) -> float:
    """The least cost of all that fits, by looking at everything."""
    modules, choices = problem.costs.shape
    every = map(np.array, itertools.product(range(choices), repeat=modules))
    return min((problem.cost_of(c) for c in every if problem.fits(c)), default=math.inf)


@pytest.mark.parametrize("seed", range(SMALL_INSTANCES))
def test_both_solvers_beside_brute_force(seed: int) -> None:
    problem = instance(seed)
    best = cheapest(problem)

    fast, exact = solve_lagrangian(problem), solve_milp(problem, gap=ROUNDING)

    assert exact.objective == pytest.approx(best, abs=ROUNDING)
    assert fast.dual_bound <= best + ROUNDING
    assert exact.objective <= fast.objective + ROUNDING
    if math.isinf(best):
        assert exact.status is Status.INFEASIBLE
        assert fast.status in (Status.INFEASIBLE, Status.UNSOLVED)
    else:
        assert exact.status is Status.OPTIMAL


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_bounds_are_in_order_and_budgets_are_kept(seed: int) -> None:
    problem = instance(seed, most_modules=40)

    fast = solve_lagrangian(problem)
    exact = solve_milp(problem, start=fast, time_limit=2)

    if exact.choices is not None:
        assert fast.dual_bound <= exact.dual_bound + ROUNDING
        assert exact.dual_bound <= exact.objective <= fast.objective
    for solution in (fast, exact):
        if solution.choices is None:
            continue
        used = problem.bytes_of(np.array(solution.choices))
        assert (used <= problem.free_bytes).all()
        assert solution.used_bytes == tuple(used)
        assert solution.objective == problem.cost_of(np.array(solution.choices))
        assert min(solution.prices) >= 0


@pytest.mark.parametrize("seed", range(20))
def test_more_budget_never_costs_more(seed: int) -> None:
    problem = instance(seed)
    budgets = [problem.free_bytes + step * 2**26 for step in range(6)]
    solved = [
        (solve_lagrangian(wider), solve_milp(wider, gap=ROUNDING))
        for wider in map(problem.with_free_bytes, budgets)
    ]

    bounds = [fast.dual_bound for fast, _ in solved]
    objectives = [exact.objective for _, exact in solved]
    for values in (bounds, objectives):
        assert all(b <= a + ROUNDING for a, b in itertools.pairwise(values))


def test_what_binds_nothing_has_no_price() -> None:
    problem = instance(1)
    roomy = problem.with_free_bytes(problem.free_bytes + 2**50)

    solution = solve_lagrangian(roomy)

    assert solution.status is Status.OPTIMAL
    assert solution.price_of_gib == 0
    assert solution.gap == 0


def test_price_is_what_a_byte_more_would_save() -> None:
    """Two modules of 1, 2 and 3 GiB: from 2 to 4 GiB each GiB saves 4."""
    gib = 2**30
    costs = [[9.0, 5.0, 1.0]] * 2
    num_bytes = [[[gib, 2 * gib, 3 * gib]] * 2]
    problem = Problem.of(costs, num_bytes, [4 * gib])

    solution = solve_lagrangian(problem)

    assert solution.objective == 10
    assert solution.price_of_gib == pytest.approx(4.0)


def test_choice_that_a_module_lacks_is_not_taken() -> None:
    problem = Problem.of([[3.0, math.inf], [2.0, 1.0]], [[[5, 0], [4, 3]]], [8])

    assert solve_milp(problem).choices == (0, 1)


def test_budget_a_byte_short_is_infeasible() -> None:
    problem = Problem.of([[1.0, 2.0]], [[[2**40 + 1, 2**40]]], [2**40])

    assert solve_milp(problem).choices == (1,)
    short = problem.with_free_bytes(problem.free_bytes - 1)
    assert solve_milp(short).status is Status.INFEASIBLE


def test_json_holds_no_number_that_json_lacks() -> None:
    nothing = solve_milp(Problem.of([[1.0]], [[[2]]], [1])).to_json()

    assert nothing["objective"] is None
    assert (nothing["status"], nothing["solver"]) == ("infeasible", "milp")


def test_what_c_code_prints_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    sys.stdout.write("before\n")
    with silenced_stdout():
        ctypes.CDLL(None).puts(b"from C")
    sys.stdout.write("after\n")

    assert capfd.readouterr().out == "before\nafter\n"


def test_solver_s_modules_load_no_torch() -> None:
    code = (
        "import sys, memplan.planner.solver; "
        "sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
