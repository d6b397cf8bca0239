"""torch.optim.AdamW, whose three implementations differ only in temporaries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from memplan.optimizers import Optimizer

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 1e-4
"""Memory does not depend on it."""


class Adamw(Optimizer):
    """Two moments in the parameter's precision (torch.optim.adam, `_init_group`)."""

    flags: ClassVar[dict[str, Any]]
    """AdamW's own arguments that choose the implementation."""

    def state_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        moment = math.prod(shape) * dtype_bytes
        return moment, moment

    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(parameters, lr=LEARNING_RATE, **self.flags)
