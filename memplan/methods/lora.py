"""LoRA: y = W x + (alpha / r) B A dropout(x), with W frozen (Hu et al., 2021).

A is (r, i) and B is (o, r). PEFT keeps both in float32 unless told otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.methods import ADAPTER_KEYS, NO_OPTIONS, Flow, Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.fields import Kind
    from memplan.recipe import Recipe


class LowRank(Method):
    """What LoRA and its kin have in common: two factors beside a frozen layer."""

    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS
    options: ClassVar[Mapping[str, Kind]] = {}
    carries_quantized: ClassVar[bool] = True
    by_lora: ClassVar[bool] = True

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        return (rank, linear.in_features), (linear.out_features, rank)

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """What A reads and what B reads."""
        inner = flow.tokens * rank * flow.adapter_bytes
        return flow.read_bytes(linear.in_features) + inner


class Lora(LowRank):
    """Low-rank adapters as PEFT installs them."""

    summary: ClassVar[str] = "low-rank adapters beside frozen linear layers"

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_lora(model, recipe, targets)


def apply_lora(
    model: nn.Module, recipe: Recipe, targets: tuple[str, ...], **flags: Any
) -> nn.Module:
    """PEFT's LoRA on the modules of those paths; `flags` are LoraConfig's own."""
    import peft

    config = peft.LoraConfig(**lora_keys(recipe, targets), **flags)
    return wrap(model, recipe, config)


def lora_keys(recipe: Recipe, targets: tuple[str, ...]) -> dict[str, Any]:
    """A recipe's keys as LoraConfig names them."""
    return {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "rank_pattern": dict(recipe.rank_pattern),
        "alpha_pattern": dict(recipe.alpha_pattern),
        **common_keys(recipe, targets),
    }


def common_keys(recipe: Recipe, targets: tuple[str, ...]) -> dict[str, Any]:
    """The keys that most of PEFT's configs share."""
    return {
        "target_modules": list(targets),
        "modules_to_save": list(recipe.trained_modules) or None,
        "task_type": "CAUSAL_LM",
    }


def wrap(model: nn.Module, recipe: Recipe, config: Any) -> nn.Module:
    """The model with what one of PEFT's configs describes."""
    import peft

    adapted: nn.Module = peft.get_peft_model(
        model, config, autocast_adapter_dtype=_is_made_single(recipe)
    )
    return adapted


def _is_made_single(recipe: Recipe) -> bool:
    """Whether PEFT casts adapters to float32.

    Always for SFTTrainer, which casts those of a quantised model again.
    """
    by_trl = recipe.trainer == "trl" and recipe.quantization != "none"
    return by_trl or recipe.adapter_dtype == "float32"


PART = Lora()
