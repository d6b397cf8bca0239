"""Liger's fused linear cross-entropy: its kernels on a card, their memory on meta.

Chunks are as large as makes their logits (C, V) about as large as all hidden states
(B T, H). The kernel writes the gradient of the logits over the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memplan.losses._fused import is_simulated, missing
from memplan.losses._head import IGNORED, Head, LossOutput
from memplan.losses.liger import NAME

HALF = (torch.float16, torch.bfloat16)

_ACCUMULATING_CAPABILITY = (8, 0)
"""From here on the weight's gradient is accumulated by the product itself."""


def compute(hidden_states: Tensor, head: Head, labels: Tensor) -> LossOutput:
    """The mean loss (`LigerForCausalLMLoss`)."""
    padded = functional.pad(labels, (0, 1), value=IGNORED)
    targets = padded[..., 1:].contiguous().view(-1)
    hidden = hidden_states.view(-1, hidden_states.size(-1))
    if is_simulated(hidden, NAME):
        loss = _FusedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, targets
        )
        return LossOutput(loss=loss)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise missing(NAME, "liger-kernel") from error
    kernel = LigerFusedLinearCrossEntropyLoss(softcap=head.scaling.softcap)
    return LossOutput(loss=kernel(head.weight, hidden, targets))


def chunk_tokens(num_tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens of a chunk: the power of two from num_tokens / ceil(V / H) on."""
    wanted = -(-num_tokens // -(-vocab_size // hidden_size))
    return min(1 << (wanted - 1).bit_length(), num_tokens)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """What `LigerFusedLinearCrossEntropyFunction` allocates, in its order."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        tokens = chunk_tokens(len(hidden), hidden.shape[1], len(weight))
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        labelled = targets != IGNORED
        labelled.sum()
        in_place = _multiplies_in_place(hidden, weight)
        buffer = hidden.new_empty((tokens, len(weight))) if in_place else None
        for start in range(0, len(hidden), tokens):
            chunk = hidden[start : start + tokens]
            gradient = grad_hidden[start : start + tokens]
            if buffer is not None:
                logits = buffer[: len(chunk)]
                torch.mm(chunk, weight.t(), out=logits)
                torch.mm(logits, weight, out=gradient)
            else:
                logits = chunk @ weight.t()
                gradient.copy_(logits @ weight)
            if grad_weight is not None:
                _accumulate(grad_weight, logits, chunk)
            del logits
        del buffer
        loss = losses.sum()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Both gradients are there already, and are multiplied in place."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None


def _multiplies_in_place(hidden: Tensor, weight: Tensor) -> bool:
    """Whether products write into a buffer, which autocast leaves alone."""
    if hidden.dtype != weight.dtype:
        return False
    autocasts = torch.is_autocast_enabled("cuda")
    return not autocasts or hidden.dtype == torch.get_autocast_dtype("cuda")


def _accumulate(grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Adds a chunk's part to the weight's gradient.

    In place where the card and the precisions allow it; else by a whole gradient in the
    product's precision, and another in float32.
    """
    modern = torch.cuda.get_device_capability() >= _ACCUMULATING_CAPABILITY
    half = grad_logits.dtype in HALF
    if modern and half and grad_weight.dtype in (grad_logits.dtype, torch.float32):
        hidden.to(grad_logits.dtype)
        return
    grad_weight += torch.mm(grad_logits.t(), hidden).float()
