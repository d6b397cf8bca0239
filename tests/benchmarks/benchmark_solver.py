"""What the knapsack of ranks costs to solve, and how near it comes.

`python tests/benchmarks/benchmark_solver.py` writes reports/benchmark_solver.md. The
modules are those of a catalog model, each with 8 ranks and 3 widths of its weights; its
moments are the load, the end of backward and the optimizer's step. Losses are a concave
prior with 5 % of noise, so that no two modules are alike.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memplan.architecture import Linear
from memplan.catalog import inspect
from memplan.planner.modules import adapted_linears
from memplan.planner.solver import Problem, Solution, solve_lagrangian, solve_milp
from memplan.recipe import Recipe

MODELS = (
    "Qwen/Qwen2.5-0.5B",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-2-70b-hf",
)
RANKS = (4, 8, 16, 32, 64, 96, 128, 256)
BITS = {4.127: 0.1, 8.0: 0.01, 16.0: 0.0}
"""Bits a weight takes, and what they lose beside the layer's weight."""
SHARES = (0.05, 0.2, 0.5)
"""How much of what lies between the fewest bytes and the most is free."""
SEEDS = (0, 1)
RUNS = 5
TOKENS = 2048
REPORT = Path(__file__).parents[2] / "reports" / "benchmark_solver.md"


def blocks(num_bytes: float) -> int:
    """Rounded up as the allocator does."""
    return -(-int(num_bytes) // 512) * 512


def bytes_of(linear: Linear, rank: int, bits: float) -> tuple[int, int, int]:
    """At the load, at the end of backward and in the optimizer's step."""
    weights = blocks(linear.num_weights * bits / 8)
    adapter = blocks(4 * rank * linear.in_features) + blocks(
        4 * rank * linear.out_features
    )
    held = 4 * TOKENS * rank
    return weights + adapter, weights + 2 * adapter + held, weights + 4 * adapter


def instance(model: str, share: float, seed: int) -> Problem:
    random = np.random.default_rng(seed)
    linears = adapted_linears(inspect(model), Recipe())
    costs, held = [], []
    for linear in linears.values():
        weight = random.uniform(0.5, 2.0)
        pairs = [(rank, bits) for rank in RANKS for bits in BITS]
        costs.append(
            [
                weight * (random.uniform(0.95, 1.05) / (1 + rank / 8) + BITS[bits])
                for rank, bits in pairs
            ]
        )
        held.append([bytes_of(linear, *pair) for pair in pairs])
    num_bytes = np.moveaxis(np.array(held, dtype=np.int64), 2, 0)
    return Problem(
        costs=np.array(costs), num_bytes=num_bytes, free_bytes=free(num_bytes, share)
    )


def free(num_bytes: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    least, most = num_bytes.min(axis=2).sum(axis=1), num_bytes.max(axis=2).sum(axis=1)
    bytes_free: NDArray[np.int64] = (least + (most - least) * share).astype(np.int64)
    return bytes_free


def cpu_seconds(solve: Callable[[], Solution]) -> tuple[float, Solution]:
    start = time.process_time()
    solution = solve()
    return time.process_time() - start, solution


def row(model: str) -> str:
    fast, exact, gaps, proven = [], [], [], []
    for share, seed in itertools.product(SHARES, SEEDS):
        problem = instance(model, share, seed)
        runs = [cpu_seconds(lambda p=problem: solve_lagrangian(p)) for _ in range(RUNS)]
        fast.append(1e3 * statistics.median(seconds for seconds, _ in runs))
        start = runs[0][1]
        seconds, solution = cpu_seconds(
            lambda p=problem, s=start: solve_milp(p, start=s, time_limit=30)
        )
        exact.append(seconds)
        gaps.append(start.gap)
        proven.append(solution.gap)
    return (
        f"| {model} | {problem.costs.size:,} | "
        f"{statistics.median(fast):.1f} / {max(fast):.1f} | {max(gaps):.1e} | "
        f"{statistics.median(exact):.2f} / {max(exact):.2f} | {max(proven):.1e} |"
    )


HEADER = """\
# What the knapsack of ranks costs to solve

`python tests/benchmarks/benchmark_solver.py` writes this file: {count} instances a row
(3 moments; budgets at {shares} of the range, {seeds} seeds). CPU time: of the
Lagrangian the median of {runs} runs, and of HiGHS once, which is asked for a gap of
1e-4 and not run where the Lagrangian proves it. Median / worst of the instances; gaps
are the worst. {machine}.

| model | binaries | Lagrangian, ms | its gap | MILP, s | its gap |
|---|--:|--:|--:|--:|--:|
"""


def main() -> None:
    header = HEADER.format(
        count=len(SHARES) * len(SEEDS),
        shares=", ".join(f"{share:.0%}" for share in SHARES),
        seeds=len(SEEDS),
        runs=RUNS,
        machine=f"{os.cpu_count()} cores, Python {platform.python_version()}",
    )
    rows = [row(model) for model in MODELS]
    REPORT.write_text(header + "\n".join(rows) + "\n")
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
