"""IR-QLoRA's elastic connection as a variant of PEFT's LoRA.

U = A dropout(x) + b1 mean(x), where mean takes i/r neighbouring inputs together, and
what is added is s (B U + b2 repeat(U)), where repeat gives o/r outputs the same.
Source: htqin/IR-QLoRA, utils.py, `IRQLoraLinear4bit.forward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memplan.methods._variant import Variant

SCALES = ("lora_scale_A", "lora_scale_B")
"""b1 and b2: a trained number each, zero at the start."""


class ElasticVariant(Variant):
    """LoRA beside which x reaches the inner width, and that the outputs, directly."""

    def init(self, module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        weight = module.lora_A[adapter_name].weight
        for name in SCALES:
            zero = nn.Parameter(
                torch.zeros(1, device=weight.device, dtype=weight.dtype)
            )
            setattr(module, name, nn.ParameterDict({adapter_name: zero}))
        module.adapter_layer_names = (*module.adapter_layer_names, *SCALES)

    def forward(
        self,
        module: Any,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        first, second = (getattr(module, name)[active_adapter] for name in SCALES)
        rank = down.out_features
        inner = down(module.lora_dropout[active_adapter](x))
        inner = inner + first * x.unflatten(-1, (rank, -1)).mean(-1)
        repeated = up(inner).unflatten(-1, (rank, -1)) + second * inner.unsqueeze(-1)
        added: torch.Tensor = repeated.flatten(-2)
        scaled: torch.Tensor = added * module.scaling[active_adapter]
        return result + scaled

    def delta(self, module: Any, adapter: str) -> torch.Tensor:
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        first, second = (getattr(module, name)[adapter] for name in SCALES)
        rows = torch.eye(down.shape[0], device=down.device, dtype=down.dtype)
        width = down.shape[1] // len(rows)
        pooling = rows.repeat_interleave(width, 1) / width
        repeating = rows.repeat_interleave(up.shape[0] // len(rows), 0)
        product = (up + second * repeating) @ (down + first * pooling)
        scaled: torch.Tensor = product * module.scaling[adapter]
        return scaled


def variant_of(options: Mapping[str, Any]) -> ElasticVariant:
    """The variant, which has no options of its own."""
    return ElasticVariant()
