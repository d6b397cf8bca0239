"""What a whole plan costs, simulation included, beside one simulation of its recipe.

`python tests/benchmarks/benchmark_plan.py` writes reports/benchmark_plan.md: CPU
seconds in one process that has imported everything, the first call of each.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from memplan import simulator
from memplan.catalog import inspect
from memplan.commands.plan import simulation_on
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.planner import choices, decide
from memplan.planner.choices import Floors
from memplan.planner.means import means_on
from memplan.planner.ranks import DEFAULT_PRIOR
from memplan.recipe import Recipe
from memplan.reporters.json import versions

REPORT = Path(__file__).parents[2] / "reports" / "benchmark_plan.md"

ASKED = (
    ("meta-llama/Llama-3.2-1B", "12GB", "quality"),
    ("meta-llama/Llama-2-7b-hf", "12GB", "quality"),
    ("meta-llama/Llama-2-7b-hf", "24GB", "quality"),
    ("meta-llama/Llama-2-7b-hf", "12GB", "length"),
    ("meta-llama/Llama-2-70b-hf", "48GB", "quality"),
    ("meta-llama/Llama-2-70b-hf", "80GB", "quality"),
)


def row(model: str, card: str, prefer: str) -> str:
    """A plan's CPU seconds, whole and without its simulations."""
    architecture, gpu = inspect(model), find_gpu(card)
    margin_bytes = int(choices.MARGIN_SHARE * gpu.budget_bytes)
    simulate = simulation_on(architecture, gpu, Recipe(), margin_bytes)
    assert simulate is not None
    seconds: list[float] = []

    def verify(recipe: Recipe) -> Footprint:
        began = time.process_time()
        found = simulate(recipe)
        seconds.append(time.process_time() - began)
        return found

    asked = decide.Asked(
        base=Recipe(),
        given=frozenset(),
        floors=Floors(margin_bytes=margin_bytes),
        prefer=prefer,
        granularity="by-type",
        prior=DEFAULT_PRIOR,
    )
    means = means_on(architecture, gpu, margin_bytes, verify)
    began = time.process_time()
    recipe = decide.plan(architecture, gpu, asked, means).recipe
    whole = time.process_time() - began
    began = time.process_time()
    simulator.simulate(architecture, recipe, gpu)
    alone = time.process_time() - began
    return (
        f"| {model} | {card} | {prefer} | {whole:.1f} | {whole - sum(seconds):.1f} "
        f"| {len(seconds)} | {alone:.1f} | {whole / alone:.1f} |"
    )


def main() -> None:
    simulator.simulate(inspect("openai-community/gpt2"), Recipe())
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    rows = "\n".join(row(*asked) for asked in ASKED)
    text = f"""# What a plan costs

CPU seconds of `memplan plan MODEL --gpu CARD --prefer ...` beside its imports, the
first call of each in one process; those without the simulations that verify it, which
are one for a recipe that holds and one for each that does not; and those of simulating
the chosen recipe once, to which the last column is the ratio. The bars are 5 s for a
model of 7 billion parameters and 10 s for one of 70 billion.
`python tests/benchmarks/benchmark_plan.py` writes this file.

{os.cpu_count()} cores, Python {platform.python_version()}, {used}.

| model | card | first | plan | of which search | simulations | one simulation | ratio |
|---|---|---|--:|--:|--:|--:|--:|
{rows}
"""
    REPORT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
