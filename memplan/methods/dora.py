"""DoRA: LoRA with a trained magnitude per output (Liu et al., 2024).

y = W x + (m / |W + s B A| - 1) W x + (m / |W + s B A|) s B A x, with m of length o and
the norm taken over inputs and detached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.methods import NO_OPTIONS
from memplan.methods.lora import LowRank, apply_lora

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.methods import Flow
    from memplan.recipe import Recipe


class Dora(LowRank):
    """Weight-decomposed low-rank adapters."""

    summary: ClassVar[str] = "LoRA with a trained magnitude per output"

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        factors = super().parameter_shapes(linear, rank, options)
        return *factors, (linear.out_features,)

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """LoRA's, the frozen layer's and the adapter's results, and three scales.

        None with dropout, where it also depends on how the frozen weight is stored.
        """
        lora = super().saved_bytes(linear, rank, flow, options)
        if flow.dropout or lora is None:
            return None
        results = flow.tokens * (flow.input_bytes + flow.adapter_bytes)
        return lora + (results + 3 * flow.adapter_bytes) * linear.out_features

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_lora(model, recipe, targets, use_dora=True)


PART = Dora()
