"""DoRA: LoRA with a trained magnitude per output (Liu et al., 2024).

y = W x + (m / |W + s B A| - 1) W x + (m / |W + s B A|) s B A x, with m of length o and
the norm taken over inputs and detached.
"""

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


class Dora(Method):
    """Weight-decomposed low-rank adapters."""

    summary: ClassVar[str] = "LoRA with a trained magnitude per output"
    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS
    options: ClassVar[Mapping[str, Kind]] = {}
    carries_quantized: ClassVar[bool] = True

    def trainable_parameters(self, linear: Linear, rank: int) -> int:
        return rank * (linear.in_features + linear.out_features) + linear.out_features

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_lora(model, recipe, targets, use_dora=True)


PART = Dora()
