"""torch.optim.AdamW in one kernel: no temporaries, step counts on the card.

Source: torch.optim.adam, `_init_group` (a float32 scalar a parameter where fused) and
`_fused_adam`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.optimizers._adamw import Adamw

if TYPE_CHECKING:
    import torch

STEP_BYTES = 4
"""The step count, a float32 scalar on the parameter's device."""


class AdamwFused(Adamw):
    """AdamW in one kernel."""

    summary: ClassVar[str] = "torch's AdamW in one kernel, Trainer's default"
    flags: ClassVar[dict[str, Any]] = {"fused": True}

    def state_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        return STEP_BYTES, *super().state_bytes(shape, dtype_bytes)

    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if parameters[0].device.type != "meta":
            return super().build(parameters)
        from memplan.optimizers._state_only import StateOnly

        return StateOnly(parameters, _state)


def _state(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    import torch

    return {
        "step": parameter.new_zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


PART = AdamwFused()
