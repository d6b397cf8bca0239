"""TRL's former `chunked_nll`: 256 tokens' logits at a time, made again in backward.

Source: TRL 1.13 and 1.14, `trl.trainer.sft_trainer._chunked_cross_entropy_loss`. It was
the default from 1.7 on; up to 1.12 each chunk multiplied float32 copies of the hidden
states and of the head's weight instead, and 1.15 brought the fused head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.losses import Loss

if TYPE_CHECKING:
    from torch import nn

NAME = "chunked-nll"


class ChunkedNll(Loss):
    """Cross-entropy over checkpointed chunks of labelled tokens."""

    summary: ClassVar[str] = "TRL's chunked_nll (1.13), 256 tokens' logits at a time"

    def prepare(self, model: nn.Module) -> None:
        from memplan.losses._chunked_nll import compute
        from memplan.losses._head import replace_forward

        replace_forward(model, NAME, compute)


PART = ChunkedNll()
