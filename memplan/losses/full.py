"""The model's own loss: all logits at once, in float32 for the softmax.

Source: transformers.loss.loss_utils, `ForCausalLMLoss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.losses import Loss

if TYPE_CHECKING:
    from torch import nn


class Full(Loss):
    """What transformers computes where labels are given."""

    summary: ClassVar[str] = "the model's own, over all logits at once"

    def prepare(self, model: nn.Module) -> None:
        """Leaves the model as it is."""


PART = Full()
