"""How a loop gets from a batch to its loss: the model's outputs and the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memplan import losses
from memplan.recipe import Recipe


def prepare_loss(model: nn.Module, recipe: Recipe) -> None:
    """Gives a model, before it is adapted, the head that the recipe's loss needs."""
    losses.find(recipe.loss).prepare(model)


def run_forward(model: nn.Module, batch: dict[str, Any], recipe: Recipe) -> Any:
    """The model's outputs for a batch with labels; runs under the loop's autocast."""
    return losses.find(recipe.loss).run(model, batch)


def read_loss(outputs: Any, recipe: Recipe) -> tuple[Any, torch.Tensor]:
    """The outputs as the loop gets them, and the loss, a scalar with its graph.

    Accelerate, under both trainers, hands outputs on in float32 once autocast is over
    (Accelerator.prepare_model).
    """
    if recipe.trainer != "plain" and recipe.autocast != "none":
        outputs = _to_float32(outputs)
    return outputs, losses.find(recipe.loss).read(outputs)


def _to_float32(outputs: Any) -> Any:
    """The outputs in float32, as accelerate's ConvertOutputsToFp32 hands them on."""
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(outputs)
