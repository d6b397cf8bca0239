"""The knobs that hold for a whole recipe: which there are, and in which order to aim.

An estimate is any function of a recipe that gives a footprint on the card. The aims, in
their order: it fits with the margin; the user's floors hold; what is preferred; quality
within a tolerance of the best; the least time; the least memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from memplan.architecture import Architecture
from memplan.footprint import Footprint
from memplan.recipe import Recipe, presets

Estimate = Callable[[Recipe], Footprint]
"""A recipe's footprint on the card that the plan is for."""

PREFERENCES = ("quality", "speed", "length")
"""What is aimed at first, once it fits within the user's floors."""

RANKS = (4, 8, 16, 32, 64, 128)
"""Ranks that are chosen from."""

LENGTH_STEP = 256
"""Tokens: lengths beyond the floor are multiples."""

LONGEST = 2**17
"""Tokens beyond which no length is tried where a model names no most."""

EFFECTIVE_BATCH = 16
"""Sequences of an optimizer step unless the user says: what seed recipes and the
trainers' examples use (QLoRA's and Alpaca's scripts)."""

CHECKPOINTING: tuple[dict[str, Any], ...] = (
    {"checkpointing": "none"},
    {"checkpointing": "full", "every_n_layers": 4},
    {"checkpointing": "full", "every_n_layers": 2},
    {"checkpointing": "full"},
    {"checkpointing": "full", "offload": True},
)
"""From the fastest to the smallest."""

OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit")
QUANTIZATIONS = ("none", "nf4-double")
"""From the most exact to the smallest; the first that fits is taken."""

LOSSES = {"plain": ("full", "liger"), "transformers": ("full", "liger")}
"""Ways to the loss that a loop can take; one that is not named has its own alone."""

MARGIN_SHARE = 0.02
"""The share of the budget that is left free unless the user says: twice the estimate's
bar beside the simulation at the median."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Floors:
    """What the user asks for at least."""

    sequence_length: int = 512
    effective_batch: int = EFFECTIVE_BATCH
    """Sequences of an optimizer step, exactly."""
    rank: int = RANKS[0]
    margin_bytes: int = 0
    """Bytes of the budget that stay free."""
    ragged: bool = False
    """Whether samples differ in length, so that a batch of several needs a mask."""


def recipes(
    base: Recipe, given: Collection[str], floors: Floors, quantization: str, length: int
) -> Iterator[Recipe]:
    """Every combination of the knobs that were not given, at a length."""
    losses: tuple[str, ...] = (base.loss,)
    if "loss" not in given:
        losses = LOSSES.get(base.trainer, losses)
    optimizers = (base.optimizer,) if "optimizer" in given else OPTIMIZERS
    checkpointing = ({},) if "checkpointing" in given else CHECKPOINTING
    for loss, optimizer, kept, batch in itertools.product(
        losses, optimizers, checkpointing, _batches(base, given, floors)
    ):
        changes = {"loss": loss, "optimizer": optimizer, **kept, **batch}
        changes |= {"quantization": quantization, "sequence_length": length}
        yield with_keys(base, given, changes)


def excess_bytes(footprint: Footprint, budget_bytes: int) -> int:
    """Bytes reserved beyond a budget, or still needed where memory ran out."""
    if footprint.failed_moment is not None:
        return max(footprint.missing_bytes, 1)
    return footprint.life_peak.reserved_bytes - budget_bytes


def departures(recipe: Recipe, base: Recipe) -> int:
    """How far a recipe's optimizer and loss are from the usual ones."""
    known = recipe.optimizer in OPTIMIZERS
    optimizer = OPTIMIZERS.index(recipe.optimizer) if known else 0
    return optimizer + (recipe.loss != base.loss)


def quantizations(base: Recipe, given: Collection[str]) -> tuple[str, ...]:
    """The schemes to try, the most exact first."""
    fixed = "quantization" in given or base.method == "full"
    return (base.quantization,) if fixed else QUANTIZATIONS


def longest_length(architecture: Architecture) -> int:
    """The longest sequence that is tried: what the model is configured for."""
    return architecture.max_positions or LONGEST


def shorter(length: int) -> int:
    """The length that is tried after one at which nothing is upheld."""
    return length * 15 // 16 // LENGTH_STEP * LENGTH_STEP


def with_keys(base: Recipe, given: Collection[str], changes: dict[str, Any]) -> Recipe:
    """The recipe with keys changed, and what its trainer's presets then say.

    A key that a preset sets follows the quantisation unless it was given.
    """
    keys = base.to_json()
    quantization = changes.get("quantization", base.quantization)
    followed = {
        key: value
        for key, value in presets(base.trainer, quantization).items()
        if key not in given
    }
    return Recipe.from_mapping(keys | followed | changes)


def _batches(
    base: Recipe, given: Collection[str], floors: Floors
) -> tuple[dict[str, Any], ...]:
    """Micro-batches, powers of two, whose steps see the effective batch."""
    if "batch_size" in given:
        return (_accumulated(base.batch_size, base, given, floors),)
    whole = floors.effective_batch
    sizes = [2**power for power in range(whole.bit_length()) if whole % 2**power == 0]
    return tuple(_accumulated(size, base, given, floors) for size in reversed(sizes))


def _accumulated(
    size: int, base: Recipe, given: Collection[str], floors: Floors
) -> dict[str, Any]:
    steps = max(1, floors.effective_batch // size)
    if "accumulation" in given:
        steps = base.accumulation
    batch = {"batch_size": size, "accumulation": steps}
    if floors.ragged and "padded" not in given:
        batch["padded"] = size > 1
    return batch
