"""LoRA-FA's optimizer: AdamW over the gradient of B, projected by A (PEFT).

g = s^-2 dB (A A^T)^-1, multiplied in bfloat16; two moments of B. What inverting an
(r, r) matrix takes of cuSOLVER is not known. Source: peft.optimizers.lorafa.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from memplan.optimizers import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

LEARNING_RATE = 1e-4
"""Memory does not depend on it."""


class LoraFa(Optimizer):
    """AdamW over projected gradients of B."""

    summary: ClassVar[str] = "LoRA-FA's AdamW over projected gradients (PEFT)"

    def state_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        moment = math.prod(shape) * dtype_bytes
        return moment, moment

    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Over parameters that no adapter has, for which it is AdamW."""
        if parameters[0].device.type == "meta":
            return self._on_meta(parameters)
        from peft.optimizers.lorafa import LoraFAOptimizer

        names = [str(number) for number in range(len(parameters))]
        scales = [None] * len(parameters)
        group = {"params": parameters, "names": names, "scaling_factors": scales}
        optimizer: torch.optim.Optimizer = LoraFAOptimizer([group], lr=LEARNING_RATE)
        return optimizer

    def build_for(
        self, model: nn.Module, parameters: list[torch.nn.Parameter]
    ) -> torch.optim.Optimizer:
        if parameters[0].device.type == "meta":
            return self._on_meta(parameters)
        from peft.optimizers import create_lorafa_optimizer

        # Rank and alpha are read of each layer; these stand in where there is none.
        optimizer: torch.optim.Optimizer = create_lorafa_optimizer(
            model, r=1, lora_alpha=1, lr=LEARNING_RATE
        )
        return optimizer

    def _on_meta(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from memplan.optimizers._projected import Projected

        return Projected(parameters)


PART = LoraFa()
