"""Cut cross-entropy: its kernels on a card, their memory on meta.

Forward keeps the log-sum-exp of every token's logits, and the mean logit of every word,
by which backward orders the vocabulary. Tiles of logits live in the kernel's registers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memplan.losses._fused import is_simulated, missing
from memplan.losses._head import IGNORED, Head, LossOutput
from memplan.losses.cut import NAME

LOCKED_ROWS = 128
"""Rows of hidden states or words that share locks."""

LOCKED_COLUMNS = 64
"""Columns of a gradient that share a lock."""


def compute(hidden_states: Tensor, head: Head, labels: Tensor) -> LossOutput:
    """The mean loss of the next tokens (`apply_lce`, shift=True)."""
    softcap = head.scaling.softcap
    if is_simulated(hidden_states, NAME):
        hidden = hidden_states.contiguous().flatten(0, -2)
        targets = labels.contiguous()
        loss = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, targets, _positions(targets), softcap is not None
        )
        return LossOutput(loss=loss)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise missing(NAME, "cut-cross-entropy") from error
    loss = linear_cross_entropy(
        hidden_states, head.weight, labels, shift=True, softcap=softcap
    )
    return LossOutput(loss=loss)


def _positions(targets: Tensor) -> Tensor:
    """The flat positions of labels that count: all over meta (`_build_flat_valids`)."""
    labelled = targets[..., 1:] != IGNORED
    found = targets.new_empty((labelled.numel(), targets.dim()))
    del labelled
    narrow = found.to(torch.int32)
    del found
    return narrow.sum(1)


class _LinearCrossEntropy(torch.autograd.Function):
    """What `LinearCrossEntropyFunction` allocates, in its order."""

    @staticmethod
    def forward(  # noqa: PLR0913 (autograd's signature)
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        positions: Tensor,
        capped: bool,
    ) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.trains = hidden.requires_grad, weight.requires_grad
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        num_labelled = len(positions)
        log_sums = hidden.new_zeros(num_labelled, dtype=torch.float32)
        locks = hidden.new_zeros(-(-num_labelled // LOCKED_ROWS), dtype=torch.int32)
        means = hidden.new_zeros(len(weight), dtype=torch.float32)
        del locks
        losses = hidden.new_zeros(num_labelled, dtype=torch.float32)
        if capped:
            losses = torch.empty_like(losses)
        ctx.save_for_backward(hidden, weight, log_sums, targets, positions, means)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        """Gradients in the precision of the product, then in that of what was given."""
        hidden, weight, log_sums, _, _, means = ctx.saved_tensors
        scratch = [means.argsort().to(torch.int32)]
        grad_hidden = torch.zeros_like(hidden) if ctx.trains[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.trains[1] else None
        scratch += [
            _locks(len(rows), hidden.shape[1], hidden)
            for rows, trains in zip((log_sums, weight), ctx.trains, strict=True)
            if trains
        ]
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.dtypes[1])
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.dtypes[0])
        return grad_hidden, grad_weight, None, None, None


def _locks(num_rows: int, num_columns: int, like: Tensor) -> Tensor:
    shape = (-(-num_rows // LOCKED_ROWS), -(-num_columns // LOCKED_COLUMNS))
    return like.new_zeros(shape, dtype=torch.int32)
