"""Cross-entropy in checkpointed chunks of tokens, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from memplan.losses._head import IGNORED, Head, LossOutput, Scaling

CHUNK_TOKENS = 256
"""`_CHUNKED_LM_HEAD_CHUNK_SIZE`."""


def compute(hidden_states: Tensor, head: Head, labels: Tensor) -> LossOutput:
    """The mean loss, and what SFTTrainer logs: hits and the sum of entropies.

    Tokens with a label are brought to the front, so that chunks without any are left
    out. The metrics keep their graph, as they do in TRL.
    """
    hidden = hidden_states[..., :-1, :].reshape(-1, hidden_states.size(-1))
    targets = labels[..., 1:].reshape(-1)
    valid = targets != IGNORED
    num_valid = valid.sum()
    order = valid.to(torch.int8).argsort(descending=True, stable=True)
    hidden = hidden[order]
    targets = targets[order]
    loss, correct, entropy = (
        hidden.new_zeros((), dtype=torch.float32) for _ in range(3)
    )
    for start in range(0, _count(valid, num_valid), CHUNK_TOKENS):
        chunk_loss, chunk_correct, chunk_entropy = checkpoint(
            _score,
            hidden[start : start + CHUNK_TOKENS],
            head.weight,
            head.bias,
            targets[start : start + CHUNK_TOKENS],
            head.scaling,
            use_reentrant=False,
        )
        loss = loss + chunk_loss
        correct = correct + chunk_correct
        entropy = entropy + chunk_entropy
    return LossOutput(
        loss=loss / num_valid.clamp(min=1), num_correct=correct, entropy_sum=entropy
    )


def _count(valid: Tensor, num_valid: Tensor) -> int:
    """Tokens that are scored; over meta tensors, where none can be asked, all are."""
    return valid.numel() if valid.device.type == "meta" else int(num_valid)


def _score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scaling: Scaling,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, hits and entropies of a chunk, whose logits become float32."""
    logits = (hidden @ weight.to(hidden.dtype).t()).float()
    if bias is not None:
        logits = logits + bias.float()
    logits = scaling.apply(logits)
    log_probs = functional.log_softmax(logits, dim=-1)
    loss = functional.nll_loss(
        log_probs, targets, ignore_index=IGNORED, reduction="sum"
    )
    valid = targets != IGNORED
    correct = ((logits.argmax(dim=-1) == targets) & valid).sum().float()
    entropy = (-(log_probs.exp() * log_probs).sum(dim=-1) * valid).sum()
    return loss, correct, entropy
