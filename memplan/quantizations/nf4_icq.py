"""IR-QLoRA's calibrated NF4: each block is shifted before it is quantised.

W = NF4(W - t) + t, with t the shift of a block of 64 weights under which the entropy of
the block's codes is largest (information calibration, Qin et al., 2024). Shifts are
held in 8 bits with a float32 absmax per 256 of them; the codes as `nf4-double` does.
Source: htqin/IR-QLoRA, utils.py, which takes only multiples of 16384 weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from memplan.quantizations._four_bits import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    FourBits,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


class Nf4Icq(FourBits):
    """bitsandbytes' NF4 of shifted weights, its absmax quantised again."""

    summary: ClassVar[str] = "NF4 of shifted blocks (IR-QLoRA's calibration)"
    quant_type: ClassVar[str] = "nf4"
    double: ClassVar[bool] = True
    loads_checkpoints: ClassVar[bool] = False
    merge_problem: ClassVar[str | None] = (
        "cannot be done: PEFT reads the base's codes without their shifts"
    )

    def stored_bytes(self, num_weights: int, out_features: int) -> tuple[int, ...]:
        blocks = math.ceil(num_weights / BLOCK_SIZE)
        shifts = blocks, 4 * math.ceil(blocks / NESTED_BLOCK_SIZE)
        return *super().stored_bytes(num_weights, out_features), *shifts

    def layer_class(self) -> type[nn.Module]:
        from memplan.quantizations._shifted import ShiftedLinear4bit

        return ShiftedLinear4bit

    def fill(self, module: nn.Module, values: torch.Tensor) -> None:
        from memplan.quantizations import _shifted

        shifts = _shifted.best_shifts(values)
        super().fill(module, _shifted.shifted(values, -shifts))
        module.take_shifts(shifts)  # type: ignore[operator]


PART = Nf4Icq()
