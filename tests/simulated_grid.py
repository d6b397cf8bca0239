"""A grid of recipes over many architectures, and what `simulate` says of each.

The grid is drawn once, from a seed, over the knobs that decide how a step runs. Its
simulations are kept in `profiles/simulated/grid.json`; `python tests/simulated_grid.py`
makes them again.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memplan import checks
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.gpu import Gpu, find_gpu
from memplan.recipe import Recipe
from memplan.store import read_json, write_json

FILE = Path(__file__).parent.parent / "profiles" / "simulated" / "grid.json"

SEED = 20261126

RECIPES_PER_MODEL = 26

MODELS = (
    "meta-llama/Llama-3.2-1B",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-1.7B",
    "google/gemma-2-2b",
    "google/gemma-3-1b-pt",
    "microsoft/phi-2",
    "EleutherAI/pythia-410m",
    "openai-community/gpt2",
    "facebook/opt-1.3b",
    "tiiuae/falcon-7b",
    "deepseek-ai/DeepSeek-V2-Lite",
)

CARDS = ("T4", "RTX 3060", "RTX 4090", "A100-SXM4-80GB", "H100 80GB HBM3")

AMPLE_BYTES = 10**13
"""More than any recipe needs: the grid asks what is taken, not what fits."""

KNOBS: dict[str, tuple[Any, ...]] = {
    "trainer": ("plain", "plain", "transformers", "trl"),
    "method": ("lora", "lora", "lora", "full", "dora", "rslora"),
    "quantization": ("none", "none", "int8", "nf4", "nf4-double", "fp4"),
    "rank": (4, 8, 16, 64),
    "dropout": (0.0, 0.0, 0.1),
    "targets": ("all-linear", "all-linear", "attention", "mlp"),
    "dtype": ("bfloat16", "bfloat16", "float16", "float32"),
    "optimizer": (
        "adamw",
        "adamw-fused",
        "adamw-loop",
        "adamw-8bit",
        "paged-adamw-32bit",
        "sgd",
        "adafactor",
        "lion-8bit",
    ),
    "batch_size": (1, 2, 4, 8, 16),
    "sequence_length": (128, 256, 512, 1024, 2048, 4096, 16384),
    "accumulation": (1, 1, 4),
    "padded": (False, False, True),
    "checkpointing": ("none", "full", "full"),
    "attention": ("auto", "auto", "auto", "eager"),
    "loss": (None, None, "full", "chunked", "chunked-nll", "liger"),
    "autocast": (None, None, "bfloat16"),
}
"""What each knob is drawn from; None leaves it to the trainer's preset."""

MOST_TOKENS = 32768
"""Tokens of a micro-batch beyond which nobody trains on one card."""


def card_of(name: str) -> Gpu:
    """A card of the catalog with room for everything."""
    return dataclasses.replace(find_gpu(name), capacity_bytes=AMPLE_BYTES)


def grid() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Models, cards and recipe keys, always the same."""
    draw = random.Random(SEED)
    for model in MODELS:
        architecture = inspect(model)
        drawn = 0
        while drawn < RECIPES_PER_MODEL:
            card = draw.choice(CARDS)
            keys = {knob: draw.choice(values) for knob, values in KNOBS.items()}
            keys = {knob: value for knob, value in keys.items() if value is not None}
            if keys["method"] == "full":
                keys["quantization"] = "none"
            if _runs(architecture, keys, card_of(card)):
                drawn += 1
                yield model, card, keys


def _runs(architecture: Architecture, keys: dict[str, Any], gpu: Gpu) -> bool:
    try:
        recipe = Recipe(**keys)
        checks.check(architecture, recipe, gpu)
    except InputError:
        return False
    positions = architecture.max_positions or MOST_TOKENS
    return recipe.tokens <= MOST_TOKENS and recipe.sequence_length <= positions


def read_grid() -> list[dict[str, Any]]:
    """The grid with its simulations, as they are kept."""
    rows: list[dict[str, Any]] = read_json(FILE)
    return rows


def simulated(model: str, card: str, keys: dict[str, Any]) -> dict[str, Any]:
    """One row of the grid."""
    from memplan.simulator import simulate

    row: dict[str, Any] = {"model": model, "gpu": card, "recipe": keys}
    try:
        footprint = simulate(inspect(model), Recipe(**keys), card_of(card))
    except InputError as error:
        return row | {"refused": str(error)}
    told = footprint.to_json()
    return row | {
        "peak": told["peak"],
        "moments": told["moments"],
        "breakdown": told["breakdown"],
    }


def main() -> None:
    """Simulates the grid; what was simulated already is kept."""
    known = read_grid() if FILE.is_file() and "--again" not in sys.argv else []
    done = {repr((row["model"], row["gpu"], row["recipe"])): row for row in known}
    rows = []
    FILE.parent.mkdir(parents=True, exist_ok=True)
    for model, card, keys in grid():
        name = repr((model, card, keys))
        rows.append(done.get(name) or simulated(model, card, keys))
        if len(rows) % 10 == 0:
            write_json(FILE, rows)
    write_json(FILE, rows)


if __name__ == "__main__":
    main()
