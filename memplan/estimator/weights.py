"""The weights as they are stored, and what loading and preparing them takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memplan import quantizations
from memplan.architecture import Architecture, Parameter
from memplan.estimator.layout import Layers, Role
from memplan.estimator.polynomials import rounded
from memplan.estimator.regimes import is_prepared
from memplan.recipe import Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBytes:
    """Bytes of the weights, at rest and on the way there."""

    codes: int
    """Of weights, quantised or not."""
    state: int
    """Of what dequantising needs besides."""
    load_peak: int
    prepare_peak: int
    """While PEFT's k-bit preparation casts what is not quantised."""
    loaded: int
    """After loading, before anything is cast."""

    @property
    def total(self) -> int:
        return self.codes + self.state


def weight_bytes(
    architecture: Architecture,
    layers: tuple[Layers, ...],
    outside: tuple[Role, ...],
    recipe: Recipe,
) -> WeightBytes:
    """sum over tensors of their stored bytes, each rounded up to 512.

    Loading a quantised model first takes one block as large as all of it
    (transformers' caching_allocator_warmup); preparing it casts one parameter after the
    other to float32, beside which its half-precision original still lives.
    """
    scheme = quantizations.find(recipe.quantization)
    item = DTYPE_BYTES[recipe.dtype]
    codes = state = loaded_others = 0
    others: list[tuple[int, int]] = []
    largest_copy = 0
    for role, count in _linears(layers, outside):
        linear = role.linear
        if role.quantized:
            stored = scheme.stored_bytes(linear.num_weights, linear.out_features)
            codes += count * rounded(stored[0])
            state += count * sum(map(rounded, stored[1:]))
            largest_copy = max(largest_copy, item * linear.num_weights)
        else:
            others.append((count, linear.num_weights))
        if linear.bias:
            others.append((count, linear.out_features))
    for parameter, count in _parameters(architecture):
        others.append((count, parameter.num_parameters))
    trained_item = 4 if is_prepared(recipe) else item
    loaded_others = sum(count * rounded(item * n) for count, n in others)
    final_others = sum(count * rounded(trained_item * n) for count, n in others)
    loaded = codes + state + loaded_others
    largest = max((n for _, n in others), default=0)
    return WeightBytes(
        codes=codes + final_others,
        state=state,
        loaded=loaded,
        load_peak=loaded + (largest_copy if recipe.quantization != "none" else 0),
        prepare_peak=codes + state + final_others + item * largest
        if trained_item != item
        else loaded,
    )


def _linears(
    layers: tuple[Layers, ...], outside: tuple[Role, ...]
) -> Iterator[tuple[Role, int]]:
    for group in layers:
        for role in group.roles:
            yield role, group.count
    for role in outside:
        yield role, 1


def _parameters(architecture: Architecture) -> Iterator[tuple[Parameter, int]]:
    for block in architecture.blocks:
        for parameter in block.parameters:
            yield parameter, len(block.layers)
    for parameter in architecture.parameters:
        yield parameter, 1


def trained_shapes(
    architecture: Architecture, layers: tuple[Layers, ...], outside: tuple[Role, ...]
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Counts and shapes of all parameters, for training them all."""
    for role, count in _linears(layers, outside):
        yield count, (role.linear.out_features, role.linear.in_features)
        if role.linear.bias:
            yield count, (role.linear.out_features,)
    for parameter, count in _parameters(architecture):
        yield count, parameter.shape
