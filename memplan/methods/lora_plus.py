"""LoRA+: LoRA whose B learns faster than A (Hayou et al., 2024).

The same memory, but for what an optimizer takes by group of parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Kind, Number
from memplan.methods import options_at
from memplan.methods.lora import LowRank, apply_lora

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from memplan.recipe import Recipe

LR_RATIO = 16.0
"""The paper's ratio of B's learning rate to A's."""


class LoraPlus(LowRank):
    """Low-rank adapters, A and B in groups of their own."""

    summary: ClassVar[str] = "LoRA whose B has a larger learning rate than A"
    options: ClassVar[Mapping[str, Kind]] = {"lr_ratio": Number(0, above_minimum=True)}
    defaults: ClassVar[Mapping[str, Any]] = {"lr_ratio": LR_RATIO}

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_lora(model, recipe, targets)

    def arrange(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, recipe: Recipe
    ) -> None:
        """The groups of PEFT's create_loraplus_optimizer."""
        from peft.optimizers import create_loraplus_optimizer

        (whole,) = optimizer.param_groups
        groups: Any = create_loraplus_optimizer(
            model,
            _groups,
            lr=whole["lr"],
            loraplus_lr_ratio=options_at(recipe, "")["lr_ratio"],
        )
        optimizer.param_groups = [
            {**whole, **group} for group in groups if group["params"]
        ]


def _groups(groups: list[dict[str, Any]], **keys: Any) -> list[dict[str, Any]]:
    """Stands for an optimizer's class, and hands its groups back."""
    return groups


PART = LoraPlus()
