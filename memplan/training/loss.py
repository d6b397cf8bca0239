"""How a loop gets from a batch to its loss: the model's outputs and the loss.

`full` is the model's own loss over all logits. `chunked` is TRL's head, which never
holds the logits: it multiplies tiles of hidden states and vocabulary in one buffer, and
does so again in backward (trl.trainer.utils.add_fused_lm_head).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memplan.errors import InputError
from memplan.recipe import Recipe

TRL_METRICS = ("log_probs", "entropy", "is_top1")
"""What SFTTrainer has the fused head compute for every token."""


def prepare_loss(model: nn.Module, recipe: Recipe) -> None:
    """Gives a model, before it is adapted, the head that the recipe's loss needs."""
    if recipe.loss != "chunked":
        return
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError as error:
        raise InputError(
            "loss",
            recipe.loss,
            "needs TRL 1.16 or later",
            "install it with: pip install -U trl; or use loss full",
        ) from error
    add_fused_lm_head(model, outputs=TRL_METRICS)  # type: ignore[arg-type]


def compute_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], recipe: Recipe
) -> tuple[Any, torch.Tensor]:
    """The model's outputs, and the loss, a scalar with its graph."""
    if recipe.loss == "chunked":
        outputs = model(**batch, fused_lm_head=True)
        losses = -outputs.log_probs
        return outputs, losses.sum() / outputs.label_mask.sum()
    outputs = model(**batch)
    if recipe.trainer == "transformers" and recipe.autocast != "none":
        outputs = _to_float32(outputs)
    return outputs, outputs["loss"]


def _to_float32(outputs: Any) -> Any:
    """The outputs in float32, as accelerate's ConvertOutputsToFp32 hands them on."""
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(outputs)
