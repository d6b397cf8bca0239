"""rsLoRA: LoRA scaled by alpha / sqrt(r) (Kalajdzievski, 2023). The same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.methods import ADAPTER_KEYS, Method
from memplan.methods.lora import apply_lora

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.fields import Kind
    from memplan.recipe import Recipe


class Rslora(Method):
    """Rank-stabilised low-rank adapters."""

    summary: ClassVar[str] = "LoRA scaled by alpha / sqrt(rank)"
    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS
    options: ClassVar[Mapping[str, Kind]] = {}
    carries_quantized: ClassVar[bool] = True

    def trainable_parameters(self, linear: Linear, rank: int) -> int:
        return rank * (linear.in_features + linear.out_features)

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_lora(model, recipe, targets, use_rslora=True)


PART = Rslora()
