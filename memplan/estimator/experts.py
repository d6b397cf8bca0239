"""Experts that PEFT adapts by parameter, which the closed form does not have.

Source: peft.utils.transformers_weight_conversion (PEFT 0.21): for these families the
names of an expert's linear layers stand for the stacked parameters that transformers 5
holds them in, and adapting those builds every expert's dense update.
"""

from __future__ import annotations

from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.recipe import Recipe

FAMILIES = frozenset(
    {
        "afmoe",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "glm4_moe_lite",
        "hunyuan_v1_moe",
        "longcat_flash",
        "minimax",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "qwen3_moe",
        "qwen3_next",
    }
)
"""Families whose experts' names PEFT converts."""

NAMES = frozenset({"down_proj", "gate", "gate_proj", "up_proj", "w1", "w2", "w3"})
"""The names that are converted."""


def check_experts(architecture: Architecture, recipe: Recipe) -> None:
    """Raises InputError where a recipe adapts stacked experts."""
    if recipe.method == "full" or architecture.model_type not in FAMILIES:
        return
    targets = recipe.targets
    if targets == "attention" or (
        not isinstance(targets, str) and not NAMES & set(targets)
    ):
        return
    raise InputError(
        "targets",
        targets,
        f"adapts the stacked experts of {architecture.name}, which the estimate does "
        "not know",
        "use `memplan simulate`, or targets attention",
    )
