"""What a warm simulation costs beside the depth of the model.

`python tests/benchmarks/benchmark_depth.py` writes reports/benchmark_depth.md: CPU
seconds of `simulator.run` in one process that has imported everything, medians of 3,
and their ratio to the first row's.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path

from memplan import simulator
from memplan.catalog import inspect
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.reporters.json import versions

MODELS = (
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Llama-3.1-405B",
)
RECIPE = Recipe(quantization="nf4-double", checkpointing="full")
CARD = find_gpu("B300")
RUNS = 3
REPORT = Path(__file__).parents[2] / "reports" / "benchmark_depth.md"


def seconds(model: str, *, whole: bool) -> float:
    """CPU seconds of a run, or of a trace of every layer with its replay."""
    architecture = inspect(model)
    start = time.process_time()
    if whole:
        traced = simulator.trace(architecture, RECIPE, CARD, whole=True)
        simulator.replay(traced.log, simulator.AllocatorSettings(), CARD.budget_bytes)
    else:
        simulator.run(architecture, RECIPE, CARD)
    return time.process_time() - start


def rows() -> list[str]:
    seconds(MODELS[0], whole=False)
    base = 0.0
    lines = []
    for model in MODELS:
        short, whole = (
            statistics.median(seconds(model, whole=whole) for _ in range(RUNS))
            for whole in (False, True)
        )
        base = base or short
        layers = inspect(model).num_layers
        lines.append(
            f"| {model} | {layers} | {short:.2f} | {short / base:.1f} | {whole:.2f} |"
        )
    return lines


def main() -> None:
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    text = f"""# What a warm simulation costs beside depth

QLoRA (nf4-double, checkpointed, 1 x 512 tokens) in a process that has imported
everything: CPU seconds, medians of {RUNS}. Few layers are traced and stand for the
others; the last column traces every layer and gives the same events.
`python tests/benchmarks/benchmark_depth.py` writes this file.

{os.cpu_count()} cores, Python {platform.python_version()}, {used}.

| model | layers | seconds | to the first | every layer traced |
|---|--:|--:|--:|--:|
"""
    REPORT.write_text(text + "\n".join(rows()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
