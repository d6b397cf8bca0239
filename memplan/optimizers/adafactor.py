"""Adafactor of transformers: second moments of matrices by row and column, in float32.

Source: transformers.optimization.Adafactor.step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from memplan.optimizers import Optimizer

if TYPE_CHECKING:
    import torch


RMS_BYTES = 4
"""The parameter's root mean square, a float32 scalar."""


class Adafactor(Optimizer):
    """Adafactor as `Trainer` builds it: no relative step, no first moment."""

    summary: ClassVar[str] = "transformers' Adafactor, second moments by row and column"

    def state_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        if len(shape) < 2:
            return RMS_BYTES, 4 * math.prod(shape)
        rows = math.prod(shape[:-1])
        columns = math.prod(shape[:-2]) * shape[-1]
        return RMS_BYTES, 4 * rows, 4 * columns

    def step_blocks(self, sizes: Sequence[int], dtype_bytes: int) -> Sequence[int]:
        """The squared gradient and its sum with eps, in float32.

        Half-precision parameters and gradients have copies in float32 besides.
        """
        largest = 4 * max(sizes, default=0) // dtype_bytes
        return (2 if dtype_bytes == 4 else 4) * (largest,)

    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as Real

        optimizer: torch.optim.Optimizer = Real(
            parameters, lr=1e-4, scale_parameter=False, relative_step=False
        )
        return optimizer


PART = Adafactor()
