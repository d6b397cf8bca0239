"""Values for a model that was built without any, so that its steps run for real.

Memory does not depend on values, but a loss that is to stay finite does: weights take
those with which their family starts a training, and quantised ones are random numbers
that bitsandbytes quantises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memplan import quantizations
from memplan.recipe import Recipe

DEVIATION = 0.02
"""Standard deviation of quantised weights: most families' `initializer_range`."""


def materialize(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """The model that `build` gave, with random weights on a device.

    It is the same object, neither prepared nor adapted yet. Tied weights stay tied.
    """
    given: dict[int, torch.Tensor] = {}
    for module in model.modules():
        # transformers calls what it built on the meta device initialised.
        module._is_hf_initialized = False  # type: ignore[assignment]
        if _is_quantized(module):
            _quantize_random(module, recipe, device)
        _give_storage(module, device, given)
    model.initialize_weights()  # type: ignore[operator]
    return model


def _quantize_random(module: Any, recipe: Recipe, device: torch.device) -> None:
    shape = (module.out_features, module.in_features)
    values = torch.empty(shape, dtype=getattr(torch, recipe.dtype), device=device)
    scheme = quantizations.find(recipe.quantization)
    scheme.fill(module, values.normal_(std=DEVIATION))
    # Neither the layer's own initialisation nor its parent's is to touch it.
    module._is_hf_initialized = True
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = True


def _give_storage(
    module: nn.Module, device: torch.device, given: dict[int, torch.Tensor]
) -> None:
    """Puts zeros on the device in the place of what is on the meta device.

    What no initialisation knows keeps them, as the bias beside a quantised weight does.
    """
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for table in tables:
        for name, tensor in table.items():
            if tensor is None or tensor.device.type != "meta":
                continue
            if id(tensor) not in given:
                given[id(tensor)] = _zeros(tensor, device)
            table[name] = given[id(tensor)]


def _zeros(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    zeros = torch.zeros_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(zeros, requires_grad=tensor.requires_grad)
    return zeros


def _is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "source_cls")  # which `training.model.quantize` says
