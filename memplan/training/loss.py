"""How a loop gets from a batch to its loss: the model's outputs and the loss.

`full` is the model's own loss over all logits. `chunked` is TRL's, which multiplies the
head by few hidden states at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memplan.recipe import Recipe


def compute_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], recipe: Recipe
) -> tuple[Any, torch.Tensor]:
    """The model's outputs, and the loss, a scalar with its graph."""
    outputs = model(**batch)
    if recipe.trainer == "transformers" and recipe.autocast != "none":
        outputs = _to_float32(outputs)
    return outputs, outputs["loss"]


def _to_float32(outputs: Any) -> Any:
    """The outputs in float32, as accelerate's ConvertOutputsToFp32 hands them on."""
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(outputs)
