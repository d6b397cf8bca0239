"""bitsandbytes' 4-bit storage, which NF4 and FP4 share.

Source: bitsandbytes `functional.quantize_4bit` and `nn.modules.Params4bit`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from memplan.quantizations import Quantization, features_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.recipe import Recipe

BLOCK_SIZE = 64
"""Weights that share an absmax (Params4bit's default `blocksize`)."""

NESTED_BLOCK_SIZE = 256
"""Absmax values that share a second-level absmax (`quantize_4bit`)."""

CODE_BYTES = 16 * 4
"""The 16 values a 4-bit code stands for, in float32, held by each layer."""

NESTED_CODE_BYTES = 256 * 4
"""The 256 values a quantised absmax stands for, in float32, held by each layer."""

OFFSET_BYTES = 4
"""The mean of the absmax values, a float32 scalar."""


class FourBits(Quantization):
    """Packed 4-bit codes with an absmax per 64 weights.

    `double` quantises the absmax values themselves to 8 bits, with a float32 absmax per
    256 of them.
    """

    bits: ClassVar[int | None] = 4
    loading_flag: ClassVar[str | None] = "is_loaded_in_4bit"
    quant_type: ClassVar[str]
    double: ClassVar[bool]

    def stored_bytes(self, num_weights: int, out_features: int) -> tuple[int, ...]:
        packed = math.ceil(num_weights / 2)
        blocks = math.ceil(num_weights / BLOCK_SIZE)
        if not self.double:
            return packed, 4 * blocks, CODE_BYTES
        nested = 4 * math.ceil(blocks / NESTED_BLOCK_SIZE)
        return packed, blocks, CODE_BYTES, OFFSET_BYTES, nested, NESTED_CODE_BYTES

    def quantized(self, linear: nn.Module, recipe: Recipe) -> nn.Module:
        import torch

        in_features, out_features = features_of(linear)
        module: nn.Module = self.layer_class()(
            in_features,
            out_features,
            bias=linear.bias is not None,
            compute_dtype=getattr(torch, recipe.compute_dtype),
            compress_statistics=self.double,
            quant_type=self.quant_type,
            device="meta",
        )
        weight = self._weight(out_features, in_features, linear.weight.dtype)
        give(module, weight)
        if linear.bias is not None:
            module.bias = linear.bias
        return module

    def layer_class(self) -> type[nn.Module]:
        """The class of the module that `quantized` makes."""
        import bitsandbytes as bnb

        layer: type[nn.Module] = bnb.nn.Linear4bit
        return layer

    def fill(self, module: nn.Module, values: torch.Tensor) -> None:
        import bitsandbytes as bnb

        weight = bnb.nn.Params4bit(
            values,
            requires_grad=False,
            blocksize=BLOCK_SIZE,
            compress_statistics=self.double,
            quant_type=self.quant_type,
        ).to(values.device)
        give(module, weight)

    def _weight(self, out_features: int, in_features: int, dtype: object) -> Any:
        """The packed weight with its state, as `Params4bit._quantize` leaves it."""
        import bitsandbytes as bnb
        import torch

        num_weights = out_features * in_features
        state = self._state(torch.Size((out_features, in_features)), dtype)
        packed = torch.empty(
            (math.ceil(num_weights / 2), 1), dtype=torch.uint8, device="meta"
        )
        return bnb.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK_SIZE,
            compress_statistics=self.double,
            quant_type=self.quant_type,
            bnb_quantized=True,
        )

    def _state(self, shape: tuple[int, ...], dtype: object) -> object:
        import torch
        from bitsandbytes.functional import QuantState

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device="meta")

        blocks = math.ceil(math.prod(shape) / BLOCK_SIZE)
        nested = None
        if self.double:
            nested = QuantState(
                absmax=floats(math.ceil(blocks / NESTED_BLOCK_SIZE)),
                code=floats(256),
                blocksize=NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
        absmax_dtype = torch.uint8 if self.double else torch.float32
        return QuantState(
            absmax=torch.empty(blocks, dtype=absmax_dtype, device="meta"),
            shape=shape,
            code=floats(16),
            blocksize=BLOCK_SIZE,
            quant_type=self.quant_type,
            dtype=dtype,
            offset=floats() if self.double else None,
            state2=nested,
        )


def give(module: Any, weight: Any) -> None:
    """Gives a layer its weight, which tells it when it is quantised anew."""
    module.weight, module.quant_state = weight, weight.quant_state
    weight.module = module
