"""HQQ's storage (Badri and Shaji, 2023), which its widths share.

Groups of 64 weights in a row have a scale and a zero point, held in 16 bits. Source:
hqq 0.2.8, `core.quantize.Quantizer` and `core.bitpack.BitPack`. The frozen layer keeps
its input for backward, and dequantises in forward and in backward
(`HQQMatmulNoCacheMul`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from memplan.errors import InputError
from memplan.quantizations import Quantization, features_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.recipe import Recipe

GROUP_SIZE = 64
"""Weights that share a scale and a zero point (HqqConfig's default)."""

HALF_BYTES = 2

THREE_BIT_CODES = 10
"""3-bit codes that an int32 holds."""


class Hqq(Quantization):
    """Integer codes with a scale and a zero point a group, packed by rows of groups."""

    loading_flag: ClassVar[str | None] = "hqq_quantized"
    # transformers 5 raises for it (`HfQuantizer.get_quantize_ops`).
    loads_checkpoints: ClassVar[bool] = False
    kbit_casts: ClassVar[bool] = False
    lora_only: ClassVar[bool] = True
    keeps_input: ClassVar[bool] = True
    merge_problem: ClassVar[str | None] = (
        "would quantise anew with HQQ's own search, which is not simulated"
    )

    def stored_bytes(self, num_weights: int, out_features: int) -> tuple[int, ...]:
        groups = num_weights // GROUP_SIZE
        codes = math.prod(self._packed_shape(groups)) * (4 if self.bits == 3 else 1)
        return codes, HALF_BYTES * groups, HALF_BYTES * groups

    def quantized(self, linear: nn.Module, recipe: Recipe) -> nn.Module:
        import torch

        in_features, out_features = features_of(linear)
        num_weights = in_features * out_features
        self._check_groups(num_weights, linear)
        module = self._module(getattr(torch, recipe.compute_dtype), "meta")
        groups = num_weights // GROUP_SIZE
        packing, dtype = _packing(self.bits)
        scale, zero = (
            torch.empty((groups, 1), dtype=module.compute_dtype, device="meta")
            for _ in range(2)
        )
        meta = {
            "nbits": self.bits,
            "group_size": GROUP_SIZE,
            "shape": torch.Size((out_features, in_features)),
            "scale": scale,
            "zero": zero,
            "axis": 1,
            "packing": packing,
            "unpack_view_dtype": dtype,
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": module.compute_dtype,
        }
        codes = torch.empty(self._packed_shape(groups), dtype=dtype, device="meta")
        module.in_features, module.out_features = in_features, out_features
        module.bias = linear.bias
        _give(module, codes, meta)
        return module  # type: ignore[no-any-return]

    def fill(self, module: Any, values: torch.Tensor) -> None:
        made = self._module(module.compute_dtype, values.device)
        made.quantize(values, **made.quant_config)
        module.device = values.device
        _give(module, made.W_q.data, made.meta)

    def _module(self, compute_dtype: torch.dtype, device: Any) -> Any:
        """A layer of HQQ without weights; raises InputError where HQQ is missing."""
        try:
            from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        except ImportError as error:
            raise InputError(
                "quantization",
                f"hqq-{self.bits}bit",
                "needs the package hqq, which is not installed",
                "pip install 'memplan[hqq]'",
            ) from error
        config = BaseQuantizeConfig(nbits=self.bits, group_size=GROUP_SIZE, axis=1)
        return HQQLinear(None, config, compute_dtype=compute_dtype, device=device)

    def _packed_shape(self, groups: int) -> tuple[int, int]:
        """Rows of codes are laid over one another, as many as an integer holds."""
        assert self.bits is not None
        if self.bits == 3:
            return math.ceil(groups / THREE_BIT_CODES), GROUP_SIZE
        return groups * self.bits // 8, GROUP_SIZE

    def _check_groups(self, num_weights: int, linear: nn.Module) -> None:
        assert self.bits is not None
        rows = 1 if self.bits == 3 else 8 // self.bits
        if num_weights % (GROUP_SIZE * rows):
            raise InputError(
                "quantization",
                f"hqq-{self.bits}bit",
                f"packs {rows} groups of {GROUP_SIZE} weights, which does not divide "
                f"the {num_weights} of {linear}",
                "use nf4, or name the layer in unquantized_modules",
            )


def _packing(bits: int | None) -> tuple[str, torch.dtype]:
    """HQQ's name for how codes are packed, and the integers that hold them."""
    from hqq.core.quantize import Quantizer

    packing = Quantizer.bit_to_packing[bits]
    return packing, Quantizer.unpack_view_dtype[packing]


def _give(module: Any, codes: torch.Tensor, meta: dict[str, Any]) -> None:
    """Gives a layer its codes and their scales, which it holds as buffers, too.

    A layer of HQQ knows its scales by a dictionary alone, where nothing that walks a
    model sees them.
    """
    import torch

    module.W_q = torch.nn.Parameter(codes, requires_grad=False)
    module.meta = meta
    for name in ("scale", "zero"):
        module.register_buffer(f"group_{name}", meta[name], persistent=False)
    module.in_gpu = module.ready = True
