"""`Inference`: how a tuned model is asked: with which adapters, for how many tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.generation import (
    DYNAMIC,
    GENERATED_TOKENS,
    GREEDY,
    STATIC,
    Generation,
    room_for_tokens,
)
from memplan.recipe import Recipe

SEPARATE = "separate"
MERGED = "merged"
NONE = "none"
POSITIONS_OF_MASK = frozenset({"bloom"})
"""Families whose positions come of the mask that they are given, which is as long as
what was read (modeling_bloom.py, `build_alibi_tensor`)."""

ADAPTERS = (SEPARATE, MERGED, NONE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """A batch of prompts, each as long as the recipe's sequences, and their answers."""

    num_tokens: int = GENERATED_TOKENS
    """Tokens of an answer."""
    adapters: str = SEPARATE
    """`separate`: beside the weights. `merged`: into them, on the card. `none`: the
    model alone, which is also one that was saved after merging."""
    sampling: str = GREEDY
    """How a token is chosen, as `memplan.generation.Generation` has it."""
    cache: str = DYNAMIC
    """How keys and values are kept, likewise."""

    def to_json(self) -> dict[str, Any]:
        """The inference as output shows it."""
        return {
            "new_tokens": self.num_tokens,
            "adapters": self.adapters,
            "sampling": self.sampling,
            "cache": self.cache,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Inference:
        """The inference that `to_json` wrote; sampling and cache may be left out."""
        return cls(
            num_tokens=data["new_tokens"],
            adapters=data["adapters"],
            sampling=data.get("sampling", GREEDY),
            cache=data.get("cache", DYNAMIC),
        )

    def generation(self, recipe: Recipe) -> Generation:
        """The generation that it is, of the recipe's batch."""
        return Generation(
            batch_size=recipe.batch_size,
            num_tokens=self.num_tokens,
            sampling=self.sampling,
            cache=self.cache,
        )

    def room(self, recipe: Recipe) -> int:
        """Tokens that a static cache is made for: the last one is not read again."""
        return recipe.sequence_length + self.num_tokens - 1

    @property
    def notes(self) -> tuple[str, ...]:
        """What it takes for granted."""
        if self.cache != STATIC:
            return ()
        return (
            "With a static cache `generate` compiles what decodes on a card, and its "
            "graphs keep memory of their own; this is with disable_compile=True.",
        )

    def settled(self, architecture: Architecture, recipe: Recipe) -> Inference:
        """The same, without adapters for a method that has none.

        Raises InputError for more tokens than the model has positions for, and for a
        static cache of a model that has no positions for what is not read yet.
        """
        if self.cache == STATIC and architecture.model_type in POSITIONS_OF_MASK:
            raise InputError(
                "--cache",
                STATIC,
                f"is longer than the mask that {architecture.name} takes its positions "
                "from",
                "leave it out",
            )
        room = room_for_tokens(architecture, recipe)
        if self.num_tokens > room:
            raise InputError(
                "--new-tokens",
                self.num_tokens,
                f"tokens do not fit behind prompts of {recipe.sequence_length}, as "
                f"{architecture.name} has but {architecture.max_positions} positions",
                f"give at most {room}, or a shorter --sequence-length",
            )
        adapters = NONE if recipe.method == "full" else self.adapters
        return dataclasses.replace(self, adapters=adapters)


def loaded_as(recipe: Recipe) -> Recipe:
    """The recipe by which a model is loaded for inference.

    Nothing is prepared for training, checkpointed or dropped out, and `generate` runs
    under no autocast.
    """
    return dataclasses.replace(
        recipe,
        trainer="plain",
        autocast="none",
        kbit_prepare=False,
        checkpointing="none",
        every_n_layers=1,
        offload=False,
        dropout=0.0,
        accumulation=1,
        loss="full",
        optimizer="adamw",
        keep_outputs="backward",
    )
