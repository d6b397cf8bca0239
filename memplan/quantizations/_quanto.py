"""quanto's storage of weights (optimum-quanto), which its widths share.

8 bits: a scale a row. 4 and 2 bits: a scale and a shift a group of 128 weights of a
row, packed by rows of groups. Scales are in the precision of the loaded weight. Source:
optimum-quanto 0.2.7, `nn.QModuleMixin`, `tensor.weights` and `tensor.packed`. The
frozen layer keeps its input for backward (`QuantizedLinearFunction`), and dequantises
in backward, mostly in forward too. On a card, widths below 8 bits run code that quanto
compiles when it is first used, for which the CUDA toolkit has to be there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from memplan.errors import InputError
from memplan.quantizations import Quantization, features_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.gpu import Gpu
    from memplan.recipe import Recipe

GROUP_SIZE = 128
"""Weights of a row that share a scale, at most (`QModuleMixin.__init__`)."""

SMALLEST_GROUP = 32
"""Rows that no group down to this divides have one scale each."""

HALF_BYTES = 2

KERNEL_CAPABILITY = (8, 0)
"""From where on 4 bits in half precision have kernels of their own
(`WeightQBitsTensor.create`)."""

TINYGEMM_ROWS = 16
"""What outputs are multiples of where torch packs 4 bits for its own product
(`_convert_weight_to_int4pack_for_cpu`; 8 on a card)."""

INNER_TILES = 2
"""Tiles of 16 inputs that lie together in such a weight (`TinyGemmPackedTensor`)."""


class Quanto(Quantization):
    """Integer codes with a scale a row or a group, as a tensor that knows both."""

    # Neither transformers nor PEFT asks a model whether quanto quantised it.
    loading_flag: ClassVar[str | None] = "quanto_quantized"
    kbit_casts: ClassVar[bool] = False
    kbit_prepares: ClassVar[bool] = False
    keeps_input: ClassVar[bool] = True
    merge_problem: ClassVar[str | None] = (
        "cannot be done: PEFT adds to the weight in place, which quanto's codes are not"
    )

    def stored_bytes(self, num_weights: int, out_features: int) -> tuple[int, ...]:
        in_features = num_weights // out_features
        scalars = HALF_BYTES, HALF_BYTES  # input_scale and output_scale
        if self.bits == 8:
            return num_weights, HALF_BYTES * out_features, *scalars
        groups = num_weights // (group_size(in_features) or in_features)
        codes = math.prod(self._packed_shape(in_features, out_features))
        scale = HALF_BYTES * groups
        if self.bits == 4 and group_size(in_features) == GROUP_SIZE:
            return codes, 2 * scale, *scalars
        return codes, scale, scale, *scalars

    def check(self, recipe: Recipe, gpu: Gpu | None) -> None:
        self._check_method(recipe)
        if recipe.dtype == "float32":
            raise InputError(
                "dtype",
                recipe.dtype,
                f"is not supported with quanto-int{self.bits}, whose scales would be "
                "in it",
                "use dtype bfloat16",
            )
        new = gpu is None or gpu.compute_capability >= KERNEL_CAPABILITY
        if self.bits == 4 and new != (recipe.dtype == "bfloat16"):
            raise InputError(
                "dtype",
                recipe.dtype,
                "is not simulated with quanto-int4 on "
                f"{gpu.name if gpu else 'a card of capability 8.0 and more'}, where "
                "quanto takes another kernel",
                f"use dtype {'bfloat16' if new else 'float16'}, or another scheme",
            )

    def _check_method(self, recipe: Recipe) -> None:
        """Raises InputError for what PEFT 0.21's layers do that quanto's cannot."""
        problem = ""
        if recipe.method == "dora":
            problem = "cannot carry DoRA, which casts the weight to another precision"
        elif self.bits != 2 and recipe.method in ("adalora", "adaq-lora"):
            problem = (
                f"cannot carry {recipe.method}, which adds in place to what its layers "
                "return as a view"
            )
        if problem:
            raise InputError(
                "quantization",
                f"quanto-int{self.bits}",
                problem,
                "use nf4-double, or another method",
            )

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        if not recipe.kbit_prepare:
            return ()
        return ("PEFT's k-bit preparation cannot cast quanto's layers: left out.",)

    def quantized(self, linear: nn.Module, recipe: Recipe) -> nn.Module:
        in_features, out_features = features_of(linear)
        module = self._module(in_features, out_features, linear.weight.dtype)
        module.bias = linear.bias
        _give(module, self._weight(module, in_features, out_features))
        return module  # type: ignore[no-any-return]

    def fill(self, module: Any, values: torch.Tensor) -> None:
        import torch

        dtype = module.input_scale.dtype
        module.weight = torch.nn.Parameter(values.to(dtype), requires_grad=False)
        weight = module.qweight.detach()
        if values.device.type == "meta" and self._is_tinygemm(module, dtype):
            # quanto asks for a CPU or a card.
            weight = _tinygemm(weight)
        _give(module, weight)

    def _module(self, in_features: int, out_features: int, dtype: Any) -> Any:
        """quanto's layer without weights; raises InputError where quanto is missing."""
        try:
            from optimum import quanto
        except ImportError as error:
            raise InputError(
                "quantization",
                f"quanto-int{self.bits}",
                "needs the package optimum-quanto, which is not installed",
                "pip install 'memplan[quanto]'",
            ) from error
        return quanto.QLinear(
            in_features,
            out_features,
            bias=False,
            dtype=dtype,
            weights=f"qint{self.bits}",
            device="meta",
        )

    def _weight(self, module: Any, in_features: int, out_features: int) -> Any:
        """The weight on the meta device, as `freeze` leaves it on a card."""
        import torch
        from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor
        from optimum.quanto.tensor.packed import PackedTensor
        from optimum.quanto.tensor.weights import tinygemm

        dtype = module.input_scale.dtype
        size = torch.Size((out_features, in_features))
        stride = (in_features, 1)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        qtype = module.weight_qtype
        if self.bits == 8:
            codes = empty(*size, dtype=torch.int8)
            scale = empty(out_features, 1)
            return WeightQBytesTensor(qtype, 0, size, stride, codes, scale, None)
        group = module.weight_group_size
        grouped = in_features if group is None else group
        groups = size.numel() // grouped
        if self._is_tinygemm(module, dtype):
            _check_rows(out_features)
            packed = tinygemm.TinyGemmPackedTensor(
                empty(*_tiles(size), dtype=torch.int32), size, stride
            )
            scales = empty(in_features // group, out_features, 2)
            return tinygemm.TinyGemmWeightQBitsTensor(
                qtype, 0, group, size, stride, packed, scales
            )
        shape = self._packed_shape(in_features, out_features)
        packed = PackedTensor(
            empty(*shape, dtype=torch.uint8),
            self.bits,
            torch.Size((groups, grouped)),
            (grouped, 1),
        )
        scale, shift = empty(groups, 1), empty(groups, 1)
        return WeightQBitsTensor(qtype, 0, group, size, stride, packed, scale, shift)

    def _is_tinygemm(self, module: Any, dtype: torch.dtype) -> bool:
        """Whether torch's own product of 4 bits is taken, whose weight lies otherwise.

        On a CPU, and on cards of capability 8.0 and more; `check` asks for one.
        """
        import torch

        grouped = module.weight_group_size == GROUP_SIZE
        return self.bits == 4 and grouped and dtype == torch.bfloat16

    def _packed_shape(self, in_features: int, out_features: int) -> tuple[int, int]:
        """Rows of groups are laid over one another, as many as a byte holds."""
        assert self.bits is not None
        width = group_size(in_features) or in_features
        groups = in_features * out_features // width
        return math.ceil(groups * self.bits / 8), width


def group_size(in_features: int) -> int | None:
    """Weights of a row that share a scale; None where a row has one.

    As `QModuleMixin.__init__` finds it: short rows have none.
    """
    if in_features <= GROUP_SIZE:
        return None
    fitting = range(GROUP_SIZE, SMALLEST_GROUP - 1, -SMALLEST_GROUP)
    return next((size for size in fitting if in_features % size == 0), None)


def _give(module: Any, weight: Any) -> None:
    """Gives a layer its quantised weight, frozen."""
    import torch

    module.weight = torch.nn.Parameter(weight, requires_grad=False)


def _tiles(size: torch.Size) -> tuple[int, int, int, int]:
    """The shape of 4-bit codes as torch packs them (`_convert_weight_to_int4pack`)."""
    rows, columns = size
    return rows // 8, columns // (16 * INNER_TILES), 32, INNER_TILES // 2


def _tinygemm(weight: Any) -> Any:
    """The weight as it is packed for torch's own product (`create`)."""
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor

    return TinyGemmWeightQBitsTensor(
        weight.qtype,
        weight.axis,
        weight._group_size,
        weight.size(),
        weight.stride(),
        weight._data.unpack(),
        (weight._scale, weight._shift),
    )


def _check_rows(out_features: int) -> None:
    if out_features % TINYGEMM_ROWS:
        raise InputError(
            "quantization",
            "quanto-int4",
            f"packs {TINYGEMM_ROWS} rows together, which does not divide the "
            f"{out_features} outputs of a layer",
            "use quanto-int8, or name the layer in unquantized_modules",
        )
