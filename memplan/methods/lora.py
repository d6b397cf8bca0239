"""LoRA: y = W x + (alpha / r) B A dropout(x), with W frozen (Hu et al., 2021).

A is (r, i) and B is (o, r). PEFT keeps both in float32 unless told otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.methods import ADAPTER_KEYS, Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.fields import Kind
    from memplan.recipe import Recipe


class Lora(Method):
    """Low-rank adapters as PEFT installs them."""

    summary: ClassVar[str] = "low-rank adapters beside frozen linear layers"
    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS
    options: ClassVar[Mapping[str, Kind]] = {}
    carries_quantized: ClassVar[bool] = True

    def trainable_parameters(self, linear: Linear, rank: int) -> int:
        return rank * (linear.in_features + linear.out_features)

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_lora(model, recipe, targets)


def apply_lora(
    model: nn.Module, recipe: Recipe, targets: tuple[str, ...], **flags: Any
) -> nn.Module:
    """PEFT's LoRA on the modules of those paths; `flags` are LoraConfig's own."""
    import peft

    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(targets),
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        modules_to_save=list(recipe.trained_modules) or None,
        task_type="CAUSAL_LM",
        **flags,
    )
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
