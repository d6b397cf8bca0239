"""Which tensors are trained: adapters, whole modules, or every parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from memplan import methods
from memplan.architecture import Architecture, Parameter
from memplan.estimator.experts import adapts_experts, expert_shapes
from memplan.estimator.layout import Layout, Role
from memplan.estimator.regimes import dtype_outside, is_head_trained, is_named
from memplan.estimator.weights import DTYPE_BYTES
from memplan.recipe import Recipe

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """Tensors of one shape and precision."""

    shape: Shape
    count: int
    item: int
    """Bytes of a number."""
    has_gradient: bool = True
    """Whether the step reaches them: it passes by a vision tower."""
    place: int = 0
    """-1 before the layers, 1 behind them, 0 in each of `count` layers."""
    is_copy: bool = False
    """Whether it is of the copy of a module, which is trained beside adapters."""

    @property
    def bytes_each(self) -> int:
        return math.prod(self.shape) * self.item


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a recipe trains."""

    tensors: tuple[Tensors, ...]

    @property
    def num_parameters(self) -> int:
        return sum(t.count * math.prod(t.shape) for t in self.tensors)

    @property
    def with_gradient(self) -> tuple[Tensors, ...]:
        return tuple(tensors for tensors in self.tensors if tensors.has_gradient)


def trained(
    architecture: Architecture, layout: Layout, recipe: Recipe, stack: str
) -> Trained:
    """The trained tensors; `stack` is where the step's layers stand."""
    if recipe.method == "full":
        item = DTYPE_BYTES[recipe.dtype]
        return Trained(tensors=tuple(_all(architecture, layout, item, stack)))
    adapters = [*_adapters(layout, recipe, stack)]
    if adapts_experts(architecture, recipe):
        adapters += _experts(layout, recipe, stack)
    return Trained(tensors=(*adapters, *_modules(architecture, recipe)))


def in_order(trained: Trained) -> list[Tensors]:
    """Every tensor with a gradient, as often as it is there, layer by layer."""
    tensors = trained.with_gradient
    turns = max((t.count for t in tensors if t.place == 0), default=0)
    before = [t for t in tensors if t.place < 0 for _ in range(t.count)]
    within = [
        t for turn in range(turns) for t in tensors if t.place == 0 and turn < t.count
    ]
    behind = [t for t in tensors if t.place > 0 for _ in range(t.count)]
    return [*before, *within, *behind]


def shapes_of(role: Role, recipe: Recipe) -> tuple[Shape, ...]:
    """Shapes of what is trained of a linear layer, or beside it."""
    linear = role.linear
    if recipe.method == "full":
        weight = (linear.out_features, linear.in_features)
        return (weight, (linear.out_features,)) if linear.bias else (weight,)
    if not role.adapted:
        return ()
    method = methods.find(recipe.method)
    return method.parameter_shapes(linear, role.rank, dict(role.options))


def _adapters(layout: Layout, recipe: Recipe, stack: str) -> Iterator[Tensors]:
    item = DTYPE_BYTES[recipe.adapter_dtype]
    for group in layout.groups:
        reached = group.block.stack == stack
        for role in group.roles:
            for shape in shapes_of(role, recipe):
                yield Tensors(
                    shape=shape, count=group.count, item=item, has_gradient=reached
                )
    for role in layout.outside:
        for shape in shapes_of(role, recipe):
            yield Tensors(shape=shape, count=1, item=item, place=1)


def _experts(layout: Layout, recipe: Recipe, stack: str) -> Iterator[Tensors]:
    item = DTYPE_BYTES[recipe.adapter_dtype]
    for group in layout.groups:
        reached = group.block.stack == stack
        for shape in expert_shapes(group.block, recipe):
            yield Tensors(
                shape=shape, count=group.count, item=item, has_gradient=reached
            )


def _modules(architecture: Architecture, recipe: Recipe) -> Iterator[Tensors]:
    """Copies of modules that are trained whole (PEFT's modules_to_save).

    The copy of a head is its own, also where the head was the embedding.
    """
    item = DTYPE_BYTES[dtype_outside(recipe)]

    def copied(shape: Shape, place: int, count: int = 1) -> Tensors:
        return Tensors(shape=shape, count=count, item=item, place=place, is_copy=True)

    for parameter in architecture.parameters:
        if is_named(parameter.path.rpartition(".")[0], recipe):
            yield copied(parameter.shape, _place(parameter))
    for block in architecture.blocks:
        for parameter in block.parameters:
            if is_named(parameter.path.rpartition(".")[0], recipe):
                yield copied(parameter.shape, 0, len(block.layers))
    for linear in architecture.linears:
        if is_named(linear.path, recipe):
            yield copied((linear.out_features, linear.in_features), 1)
            if linear.bias:
                yield copied((linear.out_features,), 1)
    if architecture.tied and is_head_trained(recipe):
        yield copied((architecture.vocab_size, architecture.hidden_size), 1)


def _place(parameter: Parameter) -> int:
    return -1 if parameter.kind == "embedding" else 1


def _all(
    architecture: Architecture, layout: Layout, item: int, stack: str
) -> Iterator[Tensors]:
    for group in layout.groups:
        reached = group.block.stack == stack
        for role in group.roles:
            yield from _whole(role, group.count, item, reached=reached)
        for parameter in group.block.parameters:
            yield Tensors(
                shape=parameter.shape,
                count=group.count,
                item=item,
                has_gradient=reached,
            )
    for role in layout.outside:
        reached = role.linear.kind == "head"
        for tensors in _whole(role, 1, item, reached=reached):
            yield dataclasses.replace(tensors, place=1)
    for parameter in architecture.parameters:
        yield Tensors(
            shape=parameter.shape, count=1, item=item, place=_place(parameter)
        )


def _whole(role: Role, count: int, item: int, *, reached: bool) -> Iterator[Tensors]:
    linear = role.linear
    yield Tensors(
        shape=(linear.out_features, linear.in_features),
        count=count,
        item=item,
        has_gradient=reached,
    )
    if linear.bias:
        yield Tensors(
            shape=(linear.out_features,), count=count, item=item, has_gradient=reached
        )
