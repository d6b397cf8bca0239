"""Full fine-tuning: every parameter of the model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.methods import NO_OPTIONS, Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.fields import Kind
    from memplan.recipe import Recipe


class Full(Method):
    """y = W x + b with W and b trained."""

    summary: ClassVar[str] = "trains every parameter"
    uses: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[Mapping[str, Kind]] = {}
    carries_quantized: ClassVar[bool] = False

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        weight = (linear.out_features, linear.in_features)
        return (weight, (linear.out_features,)) if linear.bias else (weight,)

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return model.requires_grad_(True)


PART = Full()
