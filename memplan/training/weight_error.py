"""How far a quantised layer is from the one that was loaded: ||W - Q(W)||^2.

Q(W) is read off what the module computes for unit inputs, so any scheme has it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memplan import quantizations
from memplan.recipe import Recipe

SAMPLED_FEATURES = 256
"""Inputs whose weights are looked at, evenly spaced; the error is scaled up to all."""


def squared_error(weight: Tensor, recipe: Recipe) -> float:
    """||W - Q(W)||^2 of a weight (o, i) on the host, quantised as the recipe says."""
    scheme = quantizations.find(recipe.quantization)
    if scheme.loading_flag is None:
        return 0.0
    out_features, in_features = weight.shape
    empty = nn.Linear(in_features, out_features, bias=False, device="meta")
    module = scheme.quantized(empty, recipe)
    scheme.fill(module, weight.detach().float())
    step = max(1, in_features // SAMPLED_FEATURES)
    sampled = torch.arange(0, in_features, step)
    units = torch.zeros(len(sampled), in_features)
    units[torch.arange(len(sampled)), sampled] = 1.0
    with torch.no_grad():
        found = module(units).float()
    difference = (found - weight.detach().float()[:, sampled].T).double()
    return float(difference.square().sum()) * in_features / len(sampled)
