"""Cut cross-entropy: no logits, one sum a token kept (Wijmans et al., 2024).

Source: apple/ml-cross-entropy d42911f (2025-06-26), `cut_cross_entropy.cce`, as
`cut_cross_entropy.transformers.cce_patch` installs it, with its defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.losses import Loss

if TYPE_CHECKING:
    from torch import nn

    from memplan.gpu import Gpu

NAME = "cut"

SMALLEST_CAPABILITY = (8, 0)
"""Ampere (README.md, Requirements)."""


class Cut(Loss):
    """Apple's kernels, which keep a log-sum-exp a token and make no logits."""

    summary: ClassVar[str] = "Apple's cut cross-entropy, without any logits"

    def notes(self, gpu: Gpu | None) -> tuple[str, ...]:
        if gpu is None or gpu.compute_capability >= SMALLEST_CAPABILITY:
            return ()
        major, minor = gpu.compute_capability
        return (
            f"Cut cross-entropy asks for compute capability 8.0, and {gpu.name} has "
            f"{major}.{minor}.",
        )

    def prepare(self, model: nn.Module) -> None:
        from memplan.losses._cut import compute
        from memplan.losses._fused import check_fused
        from memplan.losses._head import replace_forward

        check_fused(model, NAME)
        replace_forward(model, NAME, compute)


PART = Cut()
