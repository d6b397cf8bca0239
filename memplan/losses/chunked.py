"""TRL's fused head: tiles of hidden states and vocabulary in one buffer, twice.

Logits never exist as such: up to 4096 tokens are multiplied with 32,768 columns of the
vocabulary at a time, in forward and again in backward. Source: TRL 1.16,
`trl.trainer.utils.add_fused_lm_head` and `trl.kernels.chunked_logprob`, which run here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.errors import InputError
from memplan.losses import Loss

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "chunked"

METRICS = ("log_probs", "entropy", "is_top1")
"""What SFTTrainer has the head compute for every token."""


class Chunked(Loss):
    """The loss of SFTTrainer by TRL's own code."""

    summary: ClassVar[str] = "TRL's fused head (1.16), tile by tile in one buffer"

    def prepare(self, model: nn.Module) -> None:
        from memplan.losses._head import check_head

        try:
            from trl.trainer.utils import add_fused_lm_head
        except ImportError as error:
            raise InputError(
                "loss",
                NAME,
                "needs TRL 1.16 or later",
                "install it with: pip install -U trl; or use loss chunked-nll",
            ) from error
        check_head(model, NAME)
        add_fused_lm_head(model, outputs=METRICS)

    def run(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        from memplan.losses._head import check_head

        check_head(model, NAME)
        return model(**batch, fused_lm_head=True)

    def read(self, outputs: Any) -> Tensor:
        losses = -outputs.log_probs
        loss: Tensor = losses.sum() / outputs.label_mask.sum()
        return loss


PART = Chunked()
