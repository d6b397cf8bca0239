"""Sets plans beside the trainers' examples, by the longest sequence that fits a card.

`python reports/make_plan_against_defaults.py` makes what is missing of
plan_against_defaults.json and writes plan_against_defaults.md. It takes half an hour,
and no card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan import estimator, simulator
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.commands.plan import simulation_on
from memplan.estimator.limits import longest_sequence
from memplan.gpu import Gpu, find_gpu
from memplan.planner import choices, decide
from memplan.planner.choices import Floors
from memplan.planner.means import means_on
from memplan.planner.ranks import DEFAULT_PRIOR
from memplan.planner.search import rated
from memplan.planner.speed import step_cost
from memplan.recipe import Recipe
from memplan.simulator.replay import replay
from memplan.store import read_json, write_json

REPORT = Path(__file__).with_name("plan_against_defaults.md")
DATA = REPORT.with_suffix(".json")

STEP = 256
"""Lengths are multiples of so many tokens."""

TOLERANCE = 32
"""A length is the longest to one part in so many, or to a step."""

PAIRS = (
    ("meta-llama/Llama-3.2-1B", "GeForce RTX 3060 Laptop 6GB"),
    ("meta-llama/Llama-3.2-3B", "GeForce RTX 4060"),
    ("Qwen/Qwen2.5-7B", "GeForce RTX 3060 12GB"),
    ("mistralai/Mistral-7B-v0.3", "GeForce RTX 3060 12GB"),
    ("meta-llama/Llama-3.1-8B", "GeForce RTX 3060 12GB"),
    ("meta-llama/Llama-3.1-8B", "GeForce RTX 4090"),
    ("Qwen/Qwen3-8B", "GeForce RTX 4080"),
    ("Qwen/Qwen2.5-14B", "L4"),
    ("Qwen/Qwen2.5-32B", "L40S"),
    ("meta-llama/Llama-3.1-70B", "A100-SXM4-80GB"),
)

PLAN = "plan"

RANK = 16
"""The least rank of a plan: TRL's default; the other examples have 32 and 8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What a trainer's defaults or example say, as a recipe."""

    title: str
    source: str
    keys: Mapping[str, Any]


EXAMPLES = {
    "trl": Example(
        title="TRL's defaults",
        source="trl 1.16, trainer/sft_config.py and trainer/base_config.py (batch of "
        "8, checkpointing, adamw_torch_fused, bf16), trainer/model_config.py (r 16, "
        "alpha 32, dropout 0.05, PEFT's own targets: queries and values; nf4 without "
        "nested quantisation under --load_in_4bit). Its --dtype is bfloat16 here; the "
        "default, float32, takes more",
        keys={
            "trainer": "trl",
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.05,
            "targets": ("q_proj", "v_proj"),
            "quantization": "nf4",
            "optimizer": "adamw-fused",
            "checkpointing": "full",
            "batch_size": 8,
        },
    ),
    "axolotl": Example(
        title="axolotl's example",
        source="axolotl-ai-cloud/axolotl, examples/llama-3/qlora.yml (r 32, alpha 16, "
        "dropout 0.05, all linear layers, micro-batch 2, accumulation 4, "
        "paged_adamw_32bit, bf16, checkpointing, packed); norms and embeddings stay in "
        "bfloat16 under its flash attention (loaders/model.py)",
        keys={
            "trainer": "transformers",
            "autocast": "bfloat16",
            "rank": 32,
            "alpha": 16.0,
            "dropout": 0.05,
            "quantization": "nf4-double",
            "kbit_prepare": False,
            "optimizer": "paged-adamw-32bit",
            "checkpointing": "full",
            "batch_size": 2,
            "accumulation": 4,
        },
    ),
    "peft": Example(
        title="PEFT's example",
        source="huggingface/peft, examples/sft/run_peft.sh with train.py and utils.py "
        "(r 8, alpha 16, dropout 0.1, all linear layers, micro-batch 8, accumulation "
        "8, re-entrant checkpointing, bf16, what is not quantised in float32, by TRL's "
        "SFTTrainer); its optimizer is the trainer's default, adamw_torch_fused",
        keys={
            "trainer": "trl",
            "rank": 8,
            "alpha": 16.0,
            "dropout": 0.1,
            "quantization": "nf4-double",
            "dtype": "float32",
            "optimizer": "adamw-fused",
            "checkpointing": "full",
            "reentrant": True,
            "batch_size": 8,
            "accumulation": 8,
        },
    ),
}


def fits(architecture: Architecture, recipe: Recipe, gpu: Gpu, length: int) -> bool:
    """Whether the recipe runs on the whole card at a length, by the simulation."""
    made = dataclasses.replace(recipe, sequence_length=length)
    traced = simulator.trace(architecture, made, gpu)
    return (
        replay(traced.log, AllocatorSettings(), gpu.budget_bytes).failed_moment is None
    )


def longest(architecture: Architecture, recipe: Recipe, gpu: Gpu) -> int:
    """The longest sequence that the simulation says fits, in STEPs; 0 where none does.

    It is looked for from where the estimate has it, up to the positions that the model
    is configured for, and found to one part in TOLERANCE.
    """
    most = max(1, (architecture.max_positions or 2**17) // STEP)
    guess = longest_sequence(estimator.run(architecture, recipe, gpu), gpu) or 0
    low, high = 0, most + 1
    number = min(max(guess // STEP, 1), most)
    while high - low > max(1, low // TOLERANCE):
        if fits(architecture, recipe, gpu, number * STEP):
            low = number
        else:
            high = number
        if low > 0 and high <= most:
            number = (low + high) // 2
        else:
            stride = max(1, number // TOLERANCE)
            number = number + stride if low else number - stride
            number = min(max(number, low + 1), high - 1)
    return low * STEP


def planned(architecture: Architecture, gpu: Gpu) -> Recipe:
    """What `memplan plan --trainer trl --prefer length --min-rank 16` gives."""
    base = Recipe(trainer="trl")
    margin_bytes = int(choices.MARGIN_SHARE * gpu.budget_bytes)
    asked = decide.Asked(
        base=base,
        given=frozenset({"trainer"}),
        floors=Floors(rank=RANK, margin_bytes=margin_bytes),
        prefer="length",
        granularity="by-type",
        prior=DEFAULT_PRIOR,
    )
    verify = simulation_on(architecture, gpu, base, margin_bytes)
    means = means_on(architecture, gpu, margin_bytes, verify)
    return decide.plan(architecture, gpu, asked, means).recipe


def cell(architecture: Architecture, gpu: Gpu, name: str) -> dict[str, Any]:
    """A recipe and its longest sequence on a card."""
    recipe = planned(architecture, gpu) if name == PLAN else ways()[name]
    return {
        "recipe": recipe.to_json(),
        "longest": longest(architecture, recipe, gpu),
    }


def ways() -> dict[str, Recipe]:
    """The examples by their columns: as they are, and one sequence at a time."""
    return {
        f"{name}, {title}": recipe
        for name, example in EXAMPLES.items()
        for title, recipe in _both(Recipe.from_mapping(example.keys))
    }


def _both(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    accumulation = recipe.accumulation * recipe.batch_size
    yield _TITLES[0], recipe
    yield (
        _TITLES[1],
        dataclasses.replace(recipe, batch_size=1, accumulation=accumulation),
    )


def make_missing() -> list[dict[str, Any]]:
    """The rows, each cell kept as soon as it is made."""
    kept = read_json(DATA)["rows"] if DATA.exists() else []
    known = {(one["model"], one["gpu"]): one["cells"] for one in kept}
    found = [
        {"model": model, "gpu": card, "cells": known.get((model, card), {})}
        for model, card in PAIRS
    ]
    for row in found:
        for name in (*ways(), PLAN):
            if name not in row["cells"]:
                architecture, gpu = inspect(row["model"]), find_gpu(row["gpu"])
                row["cells"][name] = cell(architecture, gpu, name)
                write_json(DATA, {"rows": found})
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """The report on the rows that are whole."""
    found = [row for row in rows if {*ways(), PLAN} <= row["cells"].keys()]
    sources = "\n".join(
        f"* **{one.title}**: {one.source}." for one in EXAMPLES.values()
    )
    columns = [*ways()]
    head = " | ".join(("model", "card", *columns, "plan", "plan's recipe", "speed"))
    marks = "|".join(("---", "---", *["--:"] * (len(columns) + 1), "---", "--:"))
    lines = [_line(one, columns) for one in found]
    return f"""{_INTRODUCTION}
{sources}

{len(found)} of the {len(PAIRS)} pairs that the script has are worked out.

| {head} |
|{marks}|
{chr(10).join(lines)}

{_summary(found)}"""


_TITLES = ("as it is", "one at a time")

_INTRODUCTION = f"""# Plans beside the trainers' defaults

The longest sequence, to one part in {TOLERANCE} or {STEP} tokens and up to the
positions that the model is configured for, that `simulate` says fits the card, all else
as the defaults or the example have it; and one sequence at a time, with as many more
accumulated. The plan is that of `memplan plan MODEL --gpu CARD --trainer trl --prefer
length --min-rank {RANK}`, lengthened likewise. Every recipe trains adapters on 4-bit
weights, or on 16-bit ones where a plan says so. `speed` is what the plan's tokens a
second are beside those of TRL's defaults, one at a time, at the shorter of both
lengths, by the roofline. `python reports/make_plan_against_defaults.py` writes this
file.
"""


def _line(one: Mapping[str, Any], columns: list[str]) -> str:
    cells = one["cells"]
    lengths = [f"{cells[column]['longest']:,}" for column in (*columns, "plan")]
    plan = cells["plan"]["recipe"]
    kept = "offloaded" if plan["offload"] else plan["checkpointing"]
    told = (
        f"{plan['quantization']}, {plan['batch_size']} x, {kept}, {plan['optimizer']}, "
        f"rank {plan['rank']}"
    )
    shown = (one["model"], one["gpu"], *lengths, told, f"{_speed(one):.2f}")
    return f"| {' | '.join(shown)} |"


def _speed(one: Mapping[str, Any]) -> float:
    architecture, gpu = inspect(one["model"]), find_gpu(one["gpu"])
    plan, other = one["cells"]["plan"], one["cells"][f"trl, {_TITLES[1]}"]
    length = max(min(plan["longest"], other["longest"]), STEP)
    rates = [
        step_cost(
            architecture,
            Recipe.from_mapping(cell["recipe"] | {"sequence_length": length}),
            rated(gpu),
        )
        for cell in (plan, other)
    ]
    return rates[0].ratio_to(rates[1])


def _summary(found: list[dict[str, Any]]) -> str:
    """How many times as long the plan is as the best of the others, pair by pair."""
    lines = []
    for title in _TITLES:
        times = sorted(_times(one, title) for one in found)
        shown = ", ".join("new" if t == float("inf") else f"{t:.1f}" for t in times)
        lines.append(
            f"* Beside the longest of the three, {title}: {shown} times as long"
        )
    return "\n".join(
        (
            "The plan's longest sequence ('new' where none of the three runs at all):",
            "",
            *(f"{line}." for line in lines),
            "",
        )
    )


def _times(one: Mapping[str, Any], title: str) -> float:
    cells = one["cells"]
    best = max(int(cells[f"{name}, {title}"]["longest"]) for name in EXAMPLES)
    return cells["plan"]["longest"] / best if best else float("inf")


def main() -> None:
    """Makes what is missing and writes the report."""
    REPORT.write_text(report(make_missing()), encoding="utf-8")


if __name__ == "__main__":
    main()
