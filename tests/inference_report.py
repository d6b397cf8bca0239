"""Estimated inference beside simulated, as reports/accuracy_inference.md has it.

A grid is drawn once, from a seed. `python tests/inference_report.py` makes the report
again from the simulations kept in `profiles/simulated/inference.json`; with --again
these are run again, which takes minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.estimator import inference as closed_form
from memplan.gpu import Gpu, find_gpu
from memplan.inference import ADAPTERS, Inference
from memplan.recipe import Recipe
from memplan.store import read_json, write_json

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "reports" / "accuracy_inference.md"
FILE = ROOT / "profiles" / "simulated" / "inference.json"

SEED = 20261127

RECIPES_PER_MODEL = 5

MODELS = (
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-2-7b-hf",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-1.7B",
    "google/gemma-2-2b",
    "google/gemma-3-1b-pt",
    "microsoft/phi-2",
    "openai-community/gpt2",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen3.5-9B",
)

EXPERT_MODELS = (
    "mistralai/Mixtral-8x7B-v0.1",
    "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-V2-Lite",
    "openai/gpt-oss-20b",
    "google/gemma-4-26B-A4B",
    "Qwen/Qwen3.5-35B-A3B",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
)
"""The first three hold experts that PEFT adapts by parameter."""

RECIPES_WITH_EXPERTS = 4

RECIPES_WITH_STATIC_CACHE = 2
"""Of each of the MODELS."""

CARDS = ("T4", "RTX 3060", "A100-SXM4-80GB", "H100 80GB HBM3")

AMPLE_BYTES = 10**13
"""More than anything needs: the grid asks what is taken, not what fits."""

KNOBS: dict[str, tuple[Any, ...]] = {
    "method": ("lora", "lora", "dora"),
    "quantization": ("none", "none", "int8", "nf4", "nf4-double"),
    "rank": (8, 16, 64),
    "targets": ("all-linear", "attention"),
    "dtype": ("bfloat16", "bfloat16", "float16", "float32"),
    "attention": ("auto", "auto", "auto", "eager"),
    "batch_size": (1, 2, 4, 16, 64),
    "sequence_length": (64, 256, 500, 1024, 2048, 4096),
}

EXPERT_KNOBS = KNOBS | {
    "method": ("lora",),
    "targets": ("all-linear", "all-linear", "attention", "mlp"),
    "adapter_dtype": ("float32", "bfloat16"),
}
"""Experts are adapted by LoRA alone."""

NEW_TOKENS = (16, 128, 512)

STATIC = {"cache": "static"}


def grid() -> Iterator[dict[str, Any]]:
    """The rows: model, card, recipe and inference."""
    yield from _rows(MODELS, RECIPES_PER_MODEL, KNOBS, {}, SEED)
    yield from _rows(EXPERT_MODELS, RECIPES_WITH_EXPERTS, EXPERT_KNOBS, {}, SEED + 1)
    yield from _rows(MODELS, RECIPES_WITH_STATIC_CACHE, KNOBS, STATIC, SEED + 2)


def _rows(
    models: Iterable[str],
    count: int,
    knobs: dict[str, tuple[Any, ...]],
    asked: dict[str, str],
    seed: int,
) -> Iterator[dict[str, Any]]:
    chance = random.Random(seed)
    for model in models:
        longest = inspect(model).max_positions or 4096
        for _ in range(count):
            keys = {name: chance.choice(values) for name, values in knobs.items()}
            new_tokens = chance.choice(NEW_TOKENS)
            adapters = chance.choice(ADAPTERS)
            keys["sequence_length"] = min(keys["sequence_length"], longest - new_tokens)
            yield {
                "model": model,
                "gpu": chance.choice(CARDS),
                "recipe": keys,
                "inference": {"new_tokens": new_tokens, "adapters": adapters} | asked,
            }


def card_of(name: str) -> Gpu:
    """The card of that name, with more memory than anything needs."""
    return dataclasses.replace(find_gpu(name), capacity_bytes=AMPLE_BYTES)


def simulate(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its simulated peaks, or why it cannot run."""
    from memplan.simulator import inference

    try:
        found = inference.run(
            architecture_of(row["model"]),
            Recipe(**row["recipe"]),
            Inference.from_json(row["inference"]),
            card_of(row["gpu"]),
        ).footprint
    except InputError as error:
        return row | {"refused": str(error)}
    return row | {
        "moments": {m.label: m.allocated_bytes for m in found.moments},
        "kv_cache": found.moments[-1].breakdown.get("kv_cache", 0),
        "peak": found.peak_json(found.peak),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A row of the grid and the estimate's relative errors."""

    row: dict[str, Any]
    peak: float
    by_moment: dict[str, float]


@functools.cache
def architecture_of(model: str) -> Architecture:
    return inspect(model)


def judge(row: dict[str, Any]) -> Judged:
    """The errors of the estimate of a row."""
    footprint = closed_form.run(
        architecture_of(row["model"]),
        Recipe(**row["recipe"]),
        Inference.from_json(row["inference"]),
        card_of(row["gpu"]),
    ).footprint
    moments = {m.label: m.allocated_bytes for m in footprint.moments}
    return Judged(
        row=row,
        peak=footprint.peak.allocated_bytes / row["peak"]["allocated_bytes"] - 1,
        by_moment={
            label: moments[label] / there - 1 for label, there in row["moments"].items()
        },
    )


def judged_grid() -> list[Judged]:
    """All rows that can run."""
    return [judge(row) for row in read_json(FILE) if "refused" not in row]


def summary(errors: Iterable[float]) -> str:
    sizes = sorted(map(abs, errors))
    within = sum(error <= 0.03 for error in sizes)
    return (
        f"{len(sizes)} | {statistics.median(sizes):.2%} | "
        f"{sizes[int(0.9 * len(sizes))]:.2%} | {sizes[-1]:.2%} | {within}"
    )


def _is_static(row: dict[str, Any]) -> bool:
    return row["inference"].get("cache") == "static"


KINDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "without experts, growing cache": lambda row: (
        row["model"] in MODELS and not _is_static(row)
    ),
    "experts": lambda row: row["model"] in EXPERT_MODELS,
    "static cache": _is_static,
}


def report() -> str:
    """The report as Markdown."""
    judged = judged_grid()
    refused = sum("refused" in row for row in read_json(FILE))
    lines = [
        "# Estimated inference beside the simulation",
        "",
        "Made by `python tests/inference_report.py` from "
        "[simulated answers](../profiles/simulated/inference.json), drawn from a seed "
        "over models, cards, methods, quantisations, shapes and precisions, with "
        "adapters beside the weights, merged into them, or none; of models with "
        "experts; and with a static cache. Errors are those of "
        f"the allocated peak, relative to the simulation's. {refused} rows cannot run "
        "and are left out.",
        "",
        "| moment | rows | median | 90 % within | worst | within 3 % |",
        "|---|--:|--:|--:|--:|--:|",
        f"| peak | {summary(one.peak for one in judged)} |",
    ]
    for kind, belongs in KINDS.items():
        own = [one.peak for one in judged if belongs(one.row)]
        lines.append(f"| peak, {kind} | {summary(own)} |")
    for label in ("load", "adapt", "merge", "prefill", "decode"):
        own = [one.by_moment[label] for one in judged if label in one.by_moment]
        lines.append(f"| {label} | {summary(own)} |")
    lines += [
        "",
        "## By row, worst first",
        "",
        "| error | model | card | asked | recipe |",
        "|--:|---|---|---|---|",
    ]
    for one in sorted(judged, key=lambda one: -abs(one.peak)):
        row = one.row
        keys = ", ".join(f"{key} {value}" for key, value in row["recipe"].items())
        asked = "{new_tokens} tokens, adapters {adapters}".format(**row["inference"])
        asked += ", static cache" if _is_static(row) else ""
        lines.append(
            f"| {one.peak:+.2%} | {row['model']} | {row['gpu']} | {asked} | {keys} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--again" in sys.argv:
        write_json(FILE, [simulate(row) for row in grid()])
    REPORT.write_text(report(), encoding="utf-8")
