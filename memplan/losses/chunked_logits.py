"""Logits in eight chunks, all kept, of which one at a time becomes float32.

Source: torchtune 0.6, `torchtune.modules.loss.CEWithChunkedOutputLoss`, whose
cross-entropy is compiled. Axolotl's `chunked_cross_entropy` is made after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.losses import Loss

if TYPE_CHECKING:
    from torch import nn

NAME = "chunked-logits"


class ChunkedLogits(Loss):
    """Cross-entropy over chunks of logits in the model's precision."""

    summary: ClassVar[str] = "torchtune's chunks of logits, one in float32 at a time"

    def prepare(self, model: nn.Module) -> None:
        from memplan.losses._chunked_logits import compute
        from memplan.losses._head import replace_forward

        replace_forward(model, NAME, compute, plain=False)


PART = ChunkedLogits()
