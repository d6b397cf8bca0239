"""No quantisation: weights stay in the precision they are loaded in."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.quantizations import Quantization

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.recipe import Recipe


class Unquantized(Quantization):
    """Weights as loaded."""

    summary: ClassVar[str] = "weights in the precision they are loaded in"
    bits: ClassVar[int | None] = None
    loading_flag: ClassVar[str | None] = None

    def stored_bytes(self, num_weights: int, out_features: int) -> tuple[int, ...]:
        return ()

    def quantized(self, linear: nn.Module, recipe: Recipe) -> nn.Module:
        return linear

    def fill(self, module: nn.Module, values: torch.Tensor) -> None:
        raise NotImplementedError("nothing is quantised")


PART = Unquantized()
