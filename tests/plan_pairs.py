"""Plans for a hundred models and cards, and what `simulate` says of each answer.

`python tests/plan_pairs.py` makes what is missing of reports/plan_pairs.csv, a row a
pair, and writes reports/plan_pairs.md. The pairs are drawn once, from a seed. Whatever
the planner says is simulated anew: a plan on the whole card, and, where it refuses, the
smallest recipe within the floors on the card less the margin.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memplan import simulator
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.commands.plan import simulation_on
from memplan.errors import InputError
from memplan.gpu import Gpu, find_gpu, gpus
from memplan.planner import choices, decide
from memplan.planner.choices import Floors, excess_bytes
from memplan.planner.means import Means, means_on
from memplan.planner.modules import GRANULARITIES
from memplan.planner.ranks import DEFAULT_PRIOR
from memplan.recipe import Recipe
from memplan.reporters.json import versions
from memplan.units import GIB

REPORT = Path(__file__).parents[1] / "reports" / "plan_pairs.md"
ROWS = REPORT.with_suffix(".csv")

SEED = 20261127
PAIRS = 100

MODELS = (
    "01-ai/Yi-1.5-9B",
    "01-ai/Yi-34B",
    "allenai/OLMo-1B-hf",
    "allenai/OLMo-2-1124-13B",
    "allenai/Olmo-3-1025-7B",
    "bigcode/starcoder2-3b",
    "bigcode/starcoder2-15b",
    "bigscience/bloom-560m",
    "bigscience/bloom-7b1",
    "codellama/CodeLlama-34b-hf",
    "CohereLabs/aya-23-8B",
    "deepseek-ai/deepseek-coder-1.3b-base",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "EleutherAI/gpt-j-6b",
    "EleutherAI/gpt-neox-20b",
    "EleutherAI/pythia-410m",
    "EleutherAI/pythia-2.8b",
    "facebook/opt-125m",
    "facebook/opt-6.7b",
    "facebook/opt-30b",
    "google/gemma-2b",
    "google/gemma-2-2b",
    "google/gemma-2-9b",
    "google/gemma-3-1b-pt",
    "HuggingFaceTB/SmolLM2-360M",
    "HuggingFaceTB/SmolLM3-3B",
    "huggyllama/llama-13b",
    "ibm-granite/granite-3.3-8b-instruct",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "microsoft/phi-2",
    "microsoft/Phi-3.5-mini-instruct",
    "microsoft/phi-4",
    "mistralai/Mistral-7B-v0.3",
    "mistralai/Mistral-Nemo-Base-2407",
    "mistralai/Mistral-Small-24B-Base-2501",
    "openai-community/gpt2-xl",
    "Qwen/Qwen1.5-4B",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-14B",
    "Qwen/Qwen2.5-32B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-8B",
    "stabilityai/stablelm-3b-4e1t",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "tiiuae/falcon-7b",
)

LEAST_SHARE, MOST_SHARE = 0.22, 3.0
"""A card has between so many times the bytes of a model in 16 bits: from what even 4
bits exceed, to what leaves room."""

MIN_LENGTHS = (512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A model, a card, and what is asked of the plan."""

    model: str
    gpu: str
    prefer: str
    min_seq: int

    @property
    def key(self) -> tuple[str, ...]:
        """What tells the pair apart, as a row holds it."""
        return (self.model, self.gpu, self.prefer, str(self.min_seq))


def pairs() -> tuple[Pair, ...]:
    """The pairs, the same every time."""
    draw = random.Random(SEED)
    cards = [(card.name, card.capacity_bytes) for card in gpus()]
    return tuple(
        _drawn(draw, MODELS[number % len(MODELS)], cards) for number in range(PAIRS)
    )


def _drawn(draw: random.Random, model: str, cards: list[tuple[str, int]]) -> Pair:
    whole = 2 * inspect(model).total_parameters
    largest = max(capacity for _, capacity in cards)
    suited = [
        name
        for name, capacity in cards
        if LEAST_SHARE <= capacity / whole <= MOST_SHARE
        or (whole * LEAST_SHARE > largest and capacity == largest)
    ]
    smallest = min(cards, key=lambda card: card[1])[0]
    return Pair(
        model=model,
        gpu=draw.choice(sorted(suited) or [smallest]),
        prefer=draw.choice(choices.PREFERENCES),
        min_seq=draw.choice(MIN_LENGTHS),
    )


def answer(pair: Pair) -> dict[str, Any]:
    """What the planner says of a pair, and what the simulation says of that."""
    architecture, gpu = inspect(pair.model), find_gpu(pair.gpu)
    margin_bytes = int(choices.MARGIN_SHARE * gpu.budget_bytes)
    length = min(pair.min_seq, architecture.max_positions or pair.min_seq)
    floors = Floors(sequence_length=length, margin_bytes=margin_bytes)
    began = time.process_time()
    simulated: list[Recipe] = []
    verify = simulation_on(architecture, gpu, Recipe(), margin_bytes)
    assert verify is not None

    def counted(recipe: Recipe) -> Any:
        simulated.append(recipe)
        return verify(recipe)

    asked = decide.Asked(
        base=Recipe(),
        given=frozenset(),
        floors=floors,
        prefer=pair.prefer,
        granularity=GRANULARITIES[1],
        prior=DEFAULT_PRIOR,
    )
    means = means_on(architecture, gpu, margin_bytes, counted)
    try:
        made = decide.plan(architecture, gpu, asked, means)
    except InputError as error:
        said = _refused(architecture, gpu, asked, means, error)
    else:
        said = _planned(architecture, gpu, made.recipe)
    said |= {
        "budget_bytes": gpu.budget_bytes,
        "margin_bytes": margin_bytes,
        "simulations": len(simulated),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    return dataclasses.asdict(pair) | said


def _planned(architecture: Architecture, gpu: Gpu, recipe: Recipe) -> dict[str, Any]:
    footprint = simulator.simulate(architecture, recipe, gpu)
    return {
        "answer": "plan",
        "holds": bool(footprint.fits),
        "reserved_bytes": footprint.life_peak.reserved_bytes,
        "missing_bytes": max(0, footprint.missing_bytes),
        **_told(recipe),
    }


def _refused(
    architecture: Architecture,
    gpu: Gpu,
    asked: decide.Asked,
    means: Means,
    error: InputError,
) -> dict[str, Any]:
    smallest = decide.search_of(architecture, gpu, asked, means).smallest()
    kept_back = gpu.reserve_bytes + asked.floors.margin_bytes
    tighter = dataclasses.replace(gpu, reserve_bytes=kept_back)
    footprint = simulator.simulate(architecture, smallest, tighter)
    missing = excess_bytes(footprint, tighter.budget_bytes)
    return {
        "answer": "refusal" if "is too small" in str(error) else f"error: {error}",
        "holds": missing > 0,
        "reserved_bytes": footprint.life_peak.reserved_bytes,
        "missing_bytes": max(0, missing),
        **_told(smallest),
    }


SHOWN = (
    "quantization",
    "batch_size",
    "sequence_length",
    "checkpointing",
    "every_n_layers",
    "offload",
    "optimizer",
    "loss",
    "rank",
)


def _told(recipe: Recipe) -> dict[str, Any]:
    return {key: getattr(recipe, key) for key in SHOWN}


COLUMNS = (
    *Pair.__dataclass_fields__,
    "answer",
    "holds",
    "budget_bytes",
    "margin_bytes",
    "reserved_bytes",
    "missing_bytes",
    *SHOWN,
    "simulations",
    "cpu_seconds",
)


def rows() -> list[dict[str, str]]:
    """The rows that there are, in the order of the pairs."""
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8", newline="") as file:
        found = {
            tuple(row[key] for key in Pair.__dataclass_fields__): row
            for row in csv.DictReader(file)
        }
    return [found[pair.key] for pair in pairs() if pair.key in found]


def make_missing() -> None:
    """Adds the rows that are missing, each as it is made."""
    known = {tuple(row[key] for key in Pair.__dataclass_fields__) for row in rows()}
    for pair in pairs():
        if pair.key in known:
            continue
        row = answer(pair)
        new = not ROWS.exists()
        with ROWS.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        known.add(pair.key)


def report(found: list[dict[str, str]]) -> str:
    """The report on the rows."""
    planned = [row for row in found if row["answer"] == "plan"]
    refused = [row for row in found if row["answer"] == "refusal"]
    others = [row for row in found if row not in planned and row not in refused]
    missed = [row for row in found if row["holds"] != "True"]
    spare = [_spare(row) for row in planned]
    asked = [int(row["simulations"]) for row in planned]
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    head = f"""# Plans for a hundred models and cards

{len(found)} of {PAIRS} pairs of the catalog, drawn from a seed, are answered so far:
{len(set(_models(found)))} models on {len({row["gpu"] for row in found})} cards. A card
holds {LEAST_SHARE} to {MOST_SHARE:.0f} times the model in 16 bits; what is preferred
and the shortest sequence are drawn too. Every plan was simulated anew on the card; of
every refusal, the smallest recipe within the floors was, on the card less the margin of
{choices.MARGIN_SHARE:.0%}. [All rows](plan_pairs.csv). `python tests/plan_pairs.py`
writes both files.

{used}.

| | |
|---|--:|
| plans | {len(planned)} |
| of which fit in the simulation | {_held(planned)} |
| refusals | {len(refused)} |
| of which exceed the budget in the simulation | {_held(refused)} |
| other answers | {len(others)} |
| budget that plans leave free, median | {_median(spare):.1%} |
| simulations that a plan took, median and most | {_median(asked):.0f}, \
{max(asked, default=0)} |
"""
    return head + _misses(missed) + _sample(found)


def _models(found: Iterable[Mapping[str, str]]) -> Iterator[str]:
    return (row["model"] for row in found)


def _held(found: Iterable[Mapping[str, str]]) -> int:
    return sum(row["holds"] == "True" for row in found)


def _median(values: list[Any]) -> float:
    return statistics.median(values) if values else 0.0


def _spare(row: Mapping[str, str]) -> float:
    return 1 - int(row["reserved_bytes"]) / int(row["budget_bytes"])


def _misses(missed: list[dict[str, str]]) -> str:
    if not missed:
        return "\nNo answer was contradicted.\n"
    lines = [
        f"* {row['model']} on {row['gpu']}, {row['prefer']} first, from "
        f"{row['min_seq']} tokens: {row['answer']}"
        for row in missed
    ]
    return "\n".join(("\n## Answers that the simulation contradicts\n", *lines, ""))


def _sample(found: list[dict[str, str]]) -> str:
    head = """
## Pairs

| model | card | first | from | answer | recipe | reserved GiB | budget GiB |
|---|---|---|--:|---|---|--:|--:|
"""
    return head + "\n".join(map(_line, found)) + "\n"


def _line(row: Mapping[str, str]) -> str:
    reserved, budget = (
        int(row[key]) / GIB for key in ("reserved_bytes", "budget_bytes")
    )
    kept = row["checkpointing"]
    if kept == "full" and row["every_n_layers"] != "1":
        kept = f"every {row['every_n_layers']}th"
    if row["offload"] == "True":
        kept = "offloaded"
    recipe = (
        f"{row['quantization']}, {row['batch_size']} x {row['sequence_length']}, "
        f"{kept}, {row['optimizer']}, {row['loss']}, rank {row['rank']}"
    )
    return (
        f"| {row['model']} | {row['gpu']} | {row['prefer']} | {row['min_seq']} "
        f"| {row['answer']} | {recipe} | {reserved:.2f} | {budget:.2f} |"
    )


def main() -> None:
    """Makes what is missing and writes the report."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with contextlib.suppress(KeyboardInterrupt):
        make_missing()
    REPORT.write_text(report(rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
