"""What is made of a weight of n numbers while it gets adapters, or takes them in.

Sources: peft.tuners.lora of PEFT 0.21, layer.py, bnb.py, dora.py and variants.py. b are
the bytes of a number of the weight, as it is or as it is dequantised; products of
adapters that were loaded are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memplan import quantizations
from memplan.architecture import Architecture
from memplan.estimator.experts import adapted_parameters, adapts_experts
from memplan.estimator.layout import Layout
from memplan.estimator.weights import DTYPE_BYTES
from memplan.recipe import Recipe

FLOAT_BYTES = 4

DORA = "dora"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A weight, or a stack of experts' weights, that is adapted."""

    numbers: int
    dtype: str
    """Its precision, or that it is dequantised to."""
    factors: str
    """The precision in which its adapter's factors are made."""
    stored: int
    """Bytes as it is stored with its state, where it is quantised; else nothing."""
    copied: int
    """Of these, what DoRA copies: it cannot copy 8-bit weights."""

    @property
    def item(self) -> int:
        return DTYPE_BYTES[self.dtype]


def adapted_weights(
    architecture: Architecture, layout: Layout, recipe: Recipe
) -> Iterator[Weight]:
    """The weights that a recipe adapts, those that are alike once."""
    for role, _ in layout.linears:
        if role.adapted:
            yield _weight(role.linear.num_weights, recipe, quantized=role.quantized)
    if not adapts_experts(architecture, recipe):
        return
    for group in layout.groups:
        for parameter in adapted_parameters(group.block, recipe):
            yield _weight(parameter.num_parameters, recipe, quantized=False)


def _weight(numbers: int, recipe: Recipe, *, quantized: bool) -> Weight:
    """bitsandbytes dequantises 8-bit weights to float32 (`int8_vectorwise_dequant`).

    PEFT makes factors in the precision of the weight, or of what 4-bit ones compute in
    (tuners_utils, `_move_adapter_to_device_of_base_layer`).
    """
    dtype = recipe.dtype
    if not quantized:
        return Weight(numbers=numbers, dtype=dtype, factors=dtype, stored=0, copied=0)
    stored = sum(quantizations.find(recipe.quantization).stored_bytes(numbers, 1))
    is_int8 = recipe.quantization == "int8"
    return Weight(
        numbers=numbers,
        dtype="float32" if is_int8 else dtype,
        factors="float32" if is_int8 else recipe.compute_dtype,
        stored=stored,
        copied=0 if is_int8 else stored,
    )


def making_bytes(weights: list[Weight], recipe: Recipe) -> int:
    """What making the largest magnitude of DoRA holds besides: |W + s B A|.

    B A and s B A in the factors' precision, and the sum, which is single where that is
    not the weight's; of factors in float16, B A is made in float32 first. A quantised
    weight is copied and dequantised beside these. Other methods begin with given
    numbers.
    """
    if recipe.method != DORA:
        return 0
    return max(map(_magnitude_bytes, weights), default=0)


def _magnitude_bytes(weight: Weight) -> int:
    product = DTYPE_BYTES[weight.factors]
    total = product if weight.factors == weight.dtype else FLOAT_BYTES
    update = 2 * product + total
    if weight.factors == "float16":
        update = max(update, FLOAT_BYTES + product)
    dequantised = weight.item if weight.stored else 0
    return weight.copied + (dequantised + update) * weight.numbers


def made_bytes(weights: list[Weight], adapters: int) -> int:
    """Of so many bytes of single adapters, what they take before they are single."""
    item = max((DTYPE_BYTES[weight.factors] for weight in weights), default=0)
    return adapters * item // FLOAT_BYTES


def merge_bytes(weights: list[Weight], recipe: Recipe) -> int:
    """What merging adapters into the largest of the weights holds besides."""
    merging = _merged_dora_bytes if recipe.method == DORA else _merged_bytes
    return max((merging(weight, recipe) for weight in weights), default=0)


def _merged_bytes(weight: Weight, recipe: Recipe) -> int:
    """B A and s B A, 8 n.

    Beside a quantised weight there are the dequantised weight, its sum with these, and
    the sum's copy that is quantised again.
    """
    if not weight.stored:
        return 2 * FLOAT_BYTES * weight.numbers
    loaded = DTYPE_BYTES[recipe.dtype]
    return (3 * FLOAT_BYTES + loaded) * weight.numbers + weight.stored


def _merged_dora_bytes(weight: Weight, recipe: Recipe) -> int:
    """s B A, the sum W + s B A, and that times m / |W + s B A|: 12 n.

    Then the sum's copy in the weight's precision, where that is another; and a copy of
    the weight, or of a quantised one two that were dequantised and one copy.
    """
    casts = weight.item if weight.item < FLOAT_BYTES else 0
    copies = 3 if weight.stored else 1
    return (3 * FLOAT_BYTES + casts + copies * weight.item) * weight.numbers
