"""The batch that a step trains on."""

from __future__ import annotations

import torch

from memplan.recipe import Recipe


def make_batch(
    recipe: Recipe, vocab_size: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tokens, labels and, where there is one, a mask, each (B, T) of int64.

    A bare loop passes the tokens as labels too, and a mask where the batch is padded.
    The trainers' collators always give labels of their own and a mask. A padded batch
    hides the first quarter of its first sequence.
    """
    shape = (recipe.batch_size, recipe.sequence_length)
    tokens = _tokens(shape, vocab_size, device)
    labels = tokens if recipe.trainer == "plain" else tokens.clone()
    batch = {"input_ids": tokens, "labels": labels}
    if recipe.padded or recipe.trainer != "plain":
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64, device=device)
    if recipe.padded:
        batch["attention_mask"][0, : recipe.sequence_length // 4] = 0
    return batch


def _tokens(
    shape: tuple[int, int], vocab_size: int, device: torch.device
) -> torch.Tensor:
    if device.type == "meta":
        return torch.empty(shape, dtype=torch.int64, device=device)
    return torch.randint(0, vocab_size, shape, device=device)
