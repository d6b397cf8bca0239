"""What LoRA-FA's optimizer allocates, over meta parameters.

Its own code inverts matrices, which the meta device cannot.
"""

from __future__ import annotations

from typing import Any

import torch

from memplan.optimizers._state_only import StateOnly


class Projected(StateOnly):
    """Two moments a parameter, and the temporaries of one parameter at a time."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, _moments)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter] = _moments(parameter)
                    _project(parameter)


def _moments(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    return {
        "exp_avg_B": torch.zeros_like(parameter),
        "exp_avg_sq_B": torch.zeros_like(parameter),
    }


def _project(parameter: torch.nn.Parameter) -> None:
    """The gradient times an inverse, as autocast multiplies them; then a root."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.dim() != 2:
        return
    rank = gradient.shape[1]
    inverse = torch.empty(rank, rank, device=gradient.device, dtype=torch.bfloat16)
    product = torch.mm(gradient.to(torch.bfloat16), inverse)
    projected = (product * 1.0).to(gradient.dtype)
    del product
    root = parameter.abs()
    del projected, root
