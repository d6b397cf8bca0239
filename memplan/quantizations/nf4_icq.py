"""IR-QLoRA's calibrated NF4: each block is shifted before it is quantised.

W = NF4(W - t) + t, with t the shift of a block of 64 weights under which the entropy of
the block's codes is largest (information calibration, Qin et al., 2024). Shifts are
held in 8 bits with a float32 absmax per 256 of them; the codes as `nf4-double` does.
Source: htqin/IR-QLoRA, utils.py, which takes only multiples of 16384 weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from memplan.quantizations import features_of
from memplan.quantizations._four_bits import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    FourBits,
    give,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.recipe import Recipe


class Nf4Icq(FourBits):
    """bitsandbytes' NF4 of shifted weights, its absmax quantised again."""

    summary: ClassVar[str] = "NF4 of shifted blocks (IR-QLoRA's calibration)"
    quant_type: ClassVar[str] = "nf4"
    double: ClassVar[bool] = True
    merge_problem: ClassVar[str | None] = (
        "cannot be done: PEFT reads the base's codes without their shifts"
    )

    def stored_bytes(self, num_weights: int, out_features: int) -> tuple[int, ...]:
        blocks = math.ceil(num_weights / BLOCK_SIZE)
        shifts = blocks, 4 * math.ceil(blocks / NESTED_BLOCK_SIZE)
        return *super().stored_bytes(num_weights, out_features), *shifts

    def quantized(self, linear: nn.Module, recipe: Recipe) -> nn.Module:
        import torch

        from memplan.quantizations._shifted import ShiftedLinear4bit

        in_features, out_features = features_of(linear)
        module = ShiftedLinear4bit(
            in_features,
            out_features,
            bias=linear.bias is not None,
            compute_dtype=getattr(torch, recipe.compute_dtype),
            compress_statistics=self.double,
            quant_type=self.quant_type,
            device="meta",
        )
        weight = self._weight(out_features, in_features, linear.weight.dtype)
        give(module, weight)
        if linear.bias is not None:
            module.bias = linear.bias
        return module

    def fill(self, module: nn.Module, values: torch.Tensor) -> None:
        from memplan.quantizations import _shifted

        shifts = _shifted.best_shifts(values)
        super().fill(module, _shifted.shifted(values, -shifts))
        module.take_shifts(shifts)  # type: ignore[operator]


PART = Nf4Icq()
