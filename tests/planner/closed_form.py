"""A small closed form that stands for an estimate: its answers are known by hand."""

from __future__ import annotations

from collections.abc import Callable

from memplan.architecture import Architecture
from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu
from memplan.planner.modules import adapted_linears, ranks_of
from memplan.recipe import Recipe

WEIGHT_BYTES = {"none": 2.0, "nf4-double": 0.52}
STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "paged-adamw-8bit": 0}
LAYER_BYTES = 34
"""A token's activations in a layer, a number of the hidden size each."""


def footprint(architecture: Architecture, recipe: Recipe, gpu: Gpu) -> Footprint:
    """Weights, adapters, activations, logits; every moment in whole bytes."""
    full = recipe.method == "full"
    linears = {} if full else adapted_linears(architecture, recipe)
    ranks = dict.fromkeys(linears, recipe.rank)
    if recipe.rank_pattern:
        ranks = ranks_of(recipe, linears)
    trained = sum(
        rank * (linears[path].in_features + linears[path].out_features)
        for path, rank in ranks.items()
    )
    trained = architecture.total_parameters if full else trained
    weights = int(architecture.total_parameters * WEIGHT_BYTES[recipe.quantization])
    at_rest = weights + 4 * trained
    stepped = at_rest + (4 + STATE_BYTES[recipe.optimizer]) * trained
    hidden = recipe.tokens * architecture.hidden_size
    layers = architecture.num_layers
    if recipe.checkpointing == "full":
        kept = 0 if recipe.offload else 2 * layers // recipe.every_n_layers
        activations = hidden * (kept + LAYER_BYTES * recipe.every_n_layers)
    else:
        activations = hidden * LAYER_BYTES * layers
    logits = (
        recipe.tokens * architecture.vocab_size * (10 if recipe.loss == "full" else 1)
    )
    peaks = {
        "load": weights,
        "1.forward": at_rest + activations + logits,
        "1.optimizer": stepped,
        "2.forward": stepped - 4 * trained + activations + logits,
    }
    moments = tuple(
        Moment(label=label, allocated_bytes=count, reserved_bytes=count + 2**20)
        for label, count in peaks.items()
    )
    return Footprint(
        moments=moments,
        context_bytes=gpu.context_bytes,
        capacity_bytes=gpu.budget_bytes + gpu.context_bytes,
    )


def estimate_of(architecture: Architecture, gpu: Gpu) -> Callable[[Recipe], Footprint]:
    return lambda recipe: footprint(architecture, recipe, gpu)
