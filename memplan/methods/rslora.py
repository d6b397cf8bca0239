"""rsLoRA: LoRA scaled by alpha / sqrt(r) (Kalajdzievski, 2023). The same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.methods.lora import LowRank, apply_lora

if TYPE_CHECKING:
    from torch import nn

    from memplan.recipe import Recipe


class Rslora(LowRank):
    """Rank-stabilised low-rank adapters."""

    summary: ClassVar[str] = "LoRA scaled by alpha / sqrt(rank)"

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_lora(model, recipe, targets, use_rslora=True)


PART = Rslora()
