"""The knapsack of ranks: which choice for each module, within every moment's bytes.

    minimise    sum_i cost[i, x_i]
    subject to  sum_i bytes[p, i, x_i] <= free[p]   for every moment p

Sets: i modules (or groups of them), c choices of a module (a rank, or a rank and bits),
p moments of a fine-tune. x_i is the choice of module i. It is a multiple-choice
knapsack with one row a moment (Kellerer, Pferschy and Pisinger, Knapsack Problems,
chapter 11).
"""

from __future__ import annotations

from memplan.planner.solver.lagrangian import solve_lagrangian
from memplan.planner.solver.milp import solve_milp
from memplan.planner.solver.problem import Problem, Solution, Status

__all__ = ["Problem", "Solution", "Status", "solve_lagrangian", "solve_milp"]
