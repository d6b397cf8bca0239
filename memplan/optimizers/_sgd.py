"""torch.optim.SGD over lists of tensors, its default on CUDA."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from memplan.optimizers import Optimizer

if TYPE_CHECKING:
    import torch


class Sgd(Optimizer):
    """No state, or one buffer in the gradient's precision where there is momentum."""

    momentum: ClassVar[float]

    def state_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        return (math.prod(shape) * dtype_bytes,) if self.momentum else ()

    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(
            parameters, lr=1e-4, momentum=self.momentum, foreach=True
        )
