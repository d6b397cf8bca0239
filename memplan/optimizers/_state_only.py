"""An optimizer over meta parameters that only allocates its state.

It stands for optimizers whose step is one CUDA kernel without temporaries, and whose
code does not run on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LEARNING_RATE = 1e-4
"""Of no use but to methods whose groups differ in it."""


class StateOnly(torch.optim.Optimizer):
    """Creates state at the first step, parameter after parameter; updates nothing."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        state_of: Callable[[torch.nn.Parameter], dict[str, torch.Tensor]],
        loaded_state_of: Callable[[torch.nn.Parameter], dict[str, torch.Tensor]]
        | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": LEARNING_RATE})
        self._state_of = state_of
        self._loaded_state_of = loaded_state_of or state_of

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._state_of(parameter)

    def load_state_dict(self, state_dict: Any) -> None:
        """Creates the state that a checkpoint's becomes; what it holds is not read."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._loaded_state_of(parameter)
