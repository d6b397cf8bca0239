"""Liger's fused linear cross-entropy: gradients are made in forward, chunk by chunk.

Source: liger-kernel 0.8.5, `liger_kernel.ops.fused_linear_cross_entropy`, as installed
by `apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)`. Other kernels, which
Trainer's `use_liger_kernel` brings as well, are no part of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.losses import Loss

if TYPE_CHECKING:
    from torch import nn

    from memplan.gpu import Gpu

NAME = "liger"


class Liger(Loss):
    """Liger's loss alone; in evaluation it leaves the model's own, unless asked."""

    summary: ClassVar[str] = "Liger's fused linear cross-entropy, chunks of logits"

    def notes(self, gpu: Gpu | None) -> tuple[str, ...]:
        return ("Of Liger the loss alone is simulated: its other kernels save more.",)

    def prepare(self, model: nn.Module) -> None:
        from memplan.losses._fused import check_fused
        from memplan.losses._head import replace_forward
        from memplan.losses._liger import compute

        check_fused(model, NAME)
        replace_forward(model, NAME, compute, in_evaluation=False)


PART = Liger()
