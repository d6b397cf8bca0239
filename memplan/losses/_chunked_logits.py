"""Cross-entropy over chunks of logits, which torch compiles on a card."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memplan.losses._head import IGNORED, Head, LossOutput

NUM_CHUNKS = 8
"""`num_output_chunks`."""


def compute(hidden_states: Tensor, head: Head, labels: Tensor) -> LossOutput:
    """The mean loss; the last token of a sequence predicts nothing."""
    ignored = labels.new_full((len(labels), 1), IGNORED)
    targets = torch.hstack((labels[..., 1:], ignored))
    num_labelled = (targets != IGNORED).sum()
    logits = [
        head.scaling.apply(head.layer(chunk))
        for chunk in hidden_states.chunk(NUM_CHUNKS, dim=1)
    ]
    loss: Any = 0.0
    for chunk, expected in zip(logits, targets.chunk(NUM_CHUNKS, dim=1), strict=True):
        loss += _score(chunk.reshape(-1, chunk.size(-1)), expected.reshape(-1))
    return LossOutput(loss=loss / num_labelled)


def _score(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed loss: compiled on a card, as the compiler would have it on meta."""
    if logits.device.type == "meta":
        loss: Tensor = _Compiled.apply(logits, targets)  # type: ignore[no-untyped-call]
        return loss
    if logits.device.type == "cuda":
        return _compiled()(logits, targets)
    return _cross_entropy(logits, targets)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED, reduction="sum"
    )


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_cross_entropy)


class _Compiled(torch.autograd.Function):
    """What the compiled `_cross_entropy` allocates: nothing as large in float32.

    The compiler saves the logits as they came, and each row's maximum and logarithm of
    the sum, from which backward computes the rest anew.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        largest = logits.new_empty((len(logits), 1), dtype=torch.float32)
        log_sums = torch.empty_like(largest)
        ctx.save_for_backward(logits, targets, largest, log_sums)
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        logits, *_ = ctx.saved_tensors
        return torch.empty_like(logits), None
