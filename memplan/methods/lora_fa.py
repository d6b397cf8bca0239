"""LoRA-FA: LoRA with A frozen at its random start (Zhang et al., 2023).

B alone is trained, so that nothing of x is kept for A. Its own optimizer, which
projects the gradient of B, is the optimizer `lora-fa`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.methods import MASK_BYTES, NO_OPTIONS, Flow
from memplan.methods.lora import LowRank, apply_lora

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.recipe import Recipe


class LoraFa(LowRank):
    """Low-rank adapters of which B alone is trained."""

    summary: ClassVar[str] = "LoRA with A frozen"

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        return ((linear.out_features, rank),)

    def frozen_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        return ((rank, linear.in_features),)

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """What B reads, and dropout's mask."""
        mask = flow.tokens * linear.in_features * MASK_BYTES if flow.dropout else 0
        return mask + flow.tokens * rank * flow.adapter_bytes

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        import torch

        adapted = apply_lora(model, recipe, targets)
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                # What is cast after adapting is what is trained.
                dtype = getattr(torch, recipe.adapter_dtype)
                if parameter.dtype != dtype:
                    parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(False)
        return adapted


PART = LoraFa()
