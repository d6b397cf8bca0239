"""The weights: as they are stored, and while they are loaded and prepared."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from memplan import quantizations
from memplan.addresses import Addresses
from memplan.allocator import SMALL_LIMIT_BYTES
from memplan.architecture import Architecture
from memplan.estimator.layout import Layout
from memplan.estimator.polynomials import rounded
from memplan.estimator.pool import Pool
from memplan.estimator.regimes import is_prepared
from memplan.recipe import Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBytes:
    """Bytes of the weights, at rest and on the way there."""

    weights: int
    """Of the weights themselves, quantised or not."""
    state: int
    """Of what dequantising needs besides."""
    load_peak: int
    reserved: int
    """What the allocator holds after loading."""
    prepare_peak: int
    """While k-bit preparation casts what is not quantised."""

    @property
    def total(self) -> int:
        return self.weights + self.state


def weight_bytes(
    architecture: Architecture, layout: Layout, recipe: Recipe
) -> WeightBytes:
    """W = sum over tensors of what the allocator hands out for their bytes.

    A quantised layer of (o, i) is stored in the tensors that its scheme names; every
    other tensor takes its numbers times the loaded precision, or float32 once it is
    prepared (peft.prepare_model_for_kbit_training). Loading keeps one half-precision
    layer beside its codes, and preparing keeps each original beside its copy.
    """
    quantized = tuple(_quantized(layout, recipe))
    others = tuple(_others(architecture, layout))
    item = DTYPE_BYTES[recipe.dtype]
    if recipe.quantization == "none":
        handed_out, reserved = _placed(
            tuple(item * n for n, _ in others), tuple(count for _, count in others)
        )
        return WeightBytes(
            weights=handed_out,
            state=0,
            load_peak=handed_out,
            reserved=reserved,
            prepare_peak=handed_out,
        )
    codes = sum(count * rounded(sizes[0]) for sizes, count, _ in quantized)
    state = sum(count * sum(map(rounded, sizes[1:])) for sizes, count, _ in quantized)
    loaded = sum(count * rounded(item * n) for n, count in others)
    copy = item * max((numbers for _, _, numbers in quantized), default=0)
    final_item = 4 if is_prepared(recipe) else item
    final = sum(count * rounded(final_item * n) for n, count in others)
    casts = item * max((n for n, _ in others), default=0) if final_item > item else 0
    return WeightBytes(
        weights=codes + final,
        state=state,
        load_peak=codes + state + loaded + copy,
        reserved=codes + state + loaded + copy,
        prepare_peak=codes + state + final + casts,
    )


def _quantized(
    layout: Layout, recipe: Recipe
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Bytes of a quantised layer's tensors, how many there are, and its weights."""
    scheme = quantizations.find(recipe.quantization)
    for role, count in layout.linears:
        if role.quantized:
            linear = role.linear
            sizes = scheme.stored_bytes(linear.num_weights, linear.out_features)
            yield sizes, count, linear.num_weights


def _others(architecture: Architecture, layout: Layout) -> Iterator[tuple[int, int]]:
    """Numbers of the tensors that are not quantised, and how many of each."""
    for parameter in architecture.parameters:
        yield parameter.num_parameters, 1
    for role, count in layout.linears:
        if not role.quantized:
            yield role.linear.num_weights, count
        if role.linear.bias:
            yield role.linear.out_features, count
    for block in architecture.blocks:
        for parameter in block.parameters:
            yield parameter.num_parameters, len(block.layers)


@functools.lru_cache(maxsize=64)
def _placed(sizes: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, int]:
    """What the allocator hands out for tensors, layer by layer, and reserves."""
    addresses = Addresses()
    small, large = Pool(addresses, is_small=True), Pool(addresses)
    blocks = [
        (small if size <= SMALL_LIMIT_BYTES else large).malloc(size)
        for turn in range(max(counts, default=0))
        for size, count in zip(sizes, counts, strict=True)
        if turn < count and size
    ]
    handed_out = sum(block.size_bytes for block in blocks)
    return handed_out, small.reserved_bytes + large.reserved_bytes
