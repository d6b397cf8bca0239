"""An optimizer over meta parameters that only allocates its state.

It stands for optimizers whose step is one CUDA kernel without temporaries, and whose
code does not run on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class StateOnly(torch.optim.Optimizer):
    """Creates state at the first step, parameter after parameter; updates nothing."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        state_of: Callable[[torch.nn.Parameter], dict[str, torch.Tensor]],
    ) -> None:
        super().__init__(parameters, {})
        self._state_of = state_of

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._state_of(parameter)
