"""`Generation`: tokens that a model makes behind a batch of prompts."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from memplan.architecture import Architecture
from memplan.recipe import Recipe

GENERATED_TOKENS = 256
"""Tokens of a completion (TRL's GRPOConfig.max_completion_length)."""

GREEDY = "greedy"
TOP_K = "top-k"
TOP_P = "top-p"
SAMPLINGS = (GREEDY, TOP_K, TOP_P)

DYNAMIC = "dynamic"
STATIC = "static"
CACHES = (DYNAMIC, STATIC)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The completion of a batch of prompts, each as long as the recipe's sequences."""

    batch_size: int
    num_tokens: int
    sampling: str = GREEDY
    """`greedy`: the likeliest token. `top-k`: drawn from the likeliest, which is what
    `do_sample=True` does. `top-p`: so with a temperature and `top_p` besides, as the
    configs of many chat models have it."""
    cache: str = DYNAMIC
    """`dynamic`: keys and values grow token by token. `static`: they are made for all
    tokens at once (`cache_implementation="static"`)."""


def room_for_tokens(architecture: Architecture, recipe: Recipe) -> int:
    """Tokens that may follow a prompt before the learned positions end."""
    if not architecture.learned_positions or architecture.max_positions is None:
        return sys.maxsize
    return architecture.max_positions - recipe.sequence_length
