"""LLM.int8(): 8-bit rows with a float32 absmax a row (Dettmers et al., 2022).

Source: bitsandbytes `nn.modules.Int8Params` and `functional.int8_vectorwise_quant`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from memplan.quantizations import Quantization, features_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.recipe import Recipe

OUTLIER_THRESHOLD = 6.0
"""`llm_int8_threshold` of transformers' BitsAndBytesConfig."""


class Int8(Quantization):
    """bitsandbytes' int8 rows."""

    summary: ClassVar[str] = "bitsandbytes' int8 rows with a float32 absmax each"
    bits: ClassVar[int | None] = 8
    loading_flag: ClassVar[str | None] = "is_loaded_in_8bit"
    keeps_input: ClassVar[bool] = True

    def stored_bytes(self, num_weights: int, out_features: int) -> tuple[int, ...]:
        return num_weights, 4 * out_features

    def quantized(self, linear: nn.Module, recipe: Recipe) -> nn.Module:
        import bitsandbytes as bnb
        import torch

        in_features, out_features = features_of(linear)
        module: nn.Module = bnb.nn.Linear8bitLt(
            in_features,
            out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=OUTLIER_THRESHOLD,
            device="meta",
        )
        rows = torch.empty((out_features, in_features), dtype=torch.int8, device="meta")
        scales = torch.empty(out_features, dtype=torch.float32, device="meta")
        module.weight = bnb.nn.Int8Params(
            rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales
        )
        if linear.bias is not None:
            module.bias = linear.bias
        return module

    def fill(self, module: nn.Module, values: torch.Tensor) -> None:
        import bitsandbytes as bnb

        # Int8Params.to quantises what comes from the host alone.
        weight = bnb.nn.Int8Params(
            values.cpu(), requires_grad=False, has_fp16_weights=False
        )
        module.weight = weight.to(values.device)


PART = Int8()
