"""Houlsby's adapter as a variant of PEFT's LoRA: it reads what the layer gives.

h + W_up act(W_down h + b) + b, where A stands for W_down and B for W_up, with biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from memplan.methods._variant import Variant

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swish": F.silu,
}

START_DEVIATION = 1e-3
"""Of both matrices (adapter-bert, modeling.py, `feedforward_adapter`)."""


class SerialVariant(Variant):
    """A bottleneck behind the layer, no linear function of x: it never merges."""

    def __init__(self, activation: str) -> None:
        self._activation = ACTIVATIONS[activation]

    def init(self, module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        weight, width = module.lora_A[adapter_name].weight, module.out_features
        at = {"device": weight.device, "dtype": weight.dtype}
        size = module.r[adapter_name]
        for table, shape in (
            (module.lora_A, (width, size)),
            (module.lora_B, (size, width)),
        ):
            linear = nn.Linear(*shape, **at)
            nn.init.trunc_normal_(linear.weight, std=START_DEVIATION)
            nn.init.zeros_(linear.bias)
            table[adapter_name] = linear
        # The layer's input is not read, so that it need not be cast.
        module.cast_input_dtype_enabled = False

    def forward(
        self,
        module: Any,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        read = module.lora_dropout[active_adapter](result.to(down.weight.dtype))
        added: torch.Tensor = up(self._activation(down(read)))
        return result + added.to(result.dtype)


def variant_of(options: Mapping[str, Any]) -> SerialVariant:
    """The variant with the options' activation."""
    return SerialVariant(options["activation"])
