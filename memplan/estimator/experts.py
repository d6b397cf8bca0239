"""Experts whose stacked weights PEFT adapts by parameter.

Source: peft.utils.transformers_weight_conversion, peft.tuners.lora.layer.ParamWrapper
(PEFT 0.21): for these families the names of an expert's linear layers stand for the
stacked parameters that transformers 5 holds them in. Every expert has its own factors,
and each forward builds every expert's dense update, which the model's tape has.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.architecture import Architecture, Block, Parameter
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

METHODS = frozenset({"lora", "rslora", "lora-plus"})
"""The methods that PEFT has for stacked parameters."""

JOINED = "gate_up_proj"
"""Two layers in one parameter, whose update has twice the rank."""

KINDS = {"all-linear": ("experts", "router"), "mlp": ("experts",)}
"""The kinds of parameters that each of the targets adapts."""


def adapts_experts(architecture: Architecture, recipe: Recipe) -> bool:
    """Whether a recipe adapts stacked experts."""
    if recipe.method == "full" or architecture.model_type not in FAMILIES:
        return False
    targets = recipe.targets
    return targets in KINDS if isinstance(targets, str) else bool(NAMES & set(targets))


def check_experts(architecture: Architecture, recipe: Recipe) -> None:
    """Raises InputError where a recipe adapts stacked experts as PEFT cannot."""
    if not adapts_experts(architecture, recipe):
        return
    problem = f"cannot be used on the stacked experts of {architecture.name}"
    remedy = "use targets attention"
    if recipe.method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise InputError("method", recipe.method, problem, f"use {known}, or {remedy}")
    if recipe.dropout > 0:
        raise InputError("dropout", recipe.dropout, problem, f"use 0, or {remedy}")
    if not isinstance(recipe.targets, str):
        raise InputError(
            "targets",
            recipe.targets,
            "names some layers of stacked experts, which the estimate does not know",
            "use targets all-linear or mlp, or `memplan simulate`",
        )


def adapted_parameters(block: Block, recipe: Recipe) -> Iterator[Parameter]:
    """A layer's stacked experts and routers, where a recipe adapts these."""
    assert isinstance(recipe.targets, str)
    for parameter in block.parameters:
        if parameter.kind in KINDS[recipe.targets]:
            yield parameter


def expert_shapes(block: Block, recipe: Recipe) -> Iterator[tuple[int, ...]]:
    """Shapes of the factors of a layer's experts and router.

    E experts of rank r: (r E, i) and (o, r E) for weights (E, o, i), with twice the
    rank where two layers are joined; a router (E, i) is as a linear layer.
    """
    for parameter in adapted_parameters(block, recipe):
        yield from _factors(parameter, recipe.rank)


def _factors(parameter: Parameter, rank: int) -> tuple[tuple[int, ...], ...]:
    *experts, outputs, inputs = parameter.shape
    rows = rank * (experts[0] if experts else 1)
    if parameter.path.endswith(JOINED):
        rows *= 2
    return (rows, inputs), (outputs, rows)
