"""What a recipe makes of a model's linear layers: adapted, quantised, at which rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memplan import methods
from memplan.architecture import Architecture, Block, Linear
from memplan.estimator.experts import NAMES, adapts_experts
from memplan.methods import options_at, rank_at
from memplan.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """What becomes of a linear layer."""

    linear: Linear
    quantized: bool
    adapted: bool
    rank: int = 0
    """Rank of the adapter; 0 without one."""
    options: tuple[tuple[str, Any], ...] = ()
    """The method's options for this layer, defaults included."""

    @property
    def treatment(self) -> tuple[Any, ...]:
        """What becomes of it besides its rank."""
        return self.quantized, self.adapted, self.options


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Layers of one kind whose linear layers have the same roles."""

    block: Block
    layers: tuple[int, ...]
    """Their positions in the block's stack."""
    roles: tuple[Role, ...]

    @property
    def count(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A model's linear layers under a recipe."""

    groups: tuple[Group, ...]
    outside: tuple[Role, ...]
    """Linear layers outside of blocks, the head among them."""

    @property
    def linears(self) -> Iterator[tuple[Role, int]]:
        """Each role, and how many layers of the model have it."""
        for group in self.groups:
            for role in group.roles:
                yield role, group.count
        for role in self.outside:
            yield role, 1


def layout_of(
    architecture: Architecture, recipe: Recipe, plain: Mapping[str, bool]
) -> Layout:
    """The layout; `plain` says by path within a block what may be quantised."""
    alike = not _tells_layers_apart(recipe)
    adapted = _adapted(architecture, recipe, alike=alike)

    def role(linear: Linear, path: str, is_plain: bool) -> Role:
        quantized = is_plain and _is_quantized(linear, path, recipe)
        if path not in adapted:
            return Role(linear=linear, quantized=quantized, adapted=False)
        return Role(
            linear=linear,
            quantized=quantized,
            adapted=True,
            rank=rank_at(recipe, path),
            options=tuple(sorted(options_at(recipe, path).items())),
        )

    def roles(block: Block, path: str) -> tuple[Role, ...]:
        return tuple(
            role(linear, f"{path}.{linear.path}", plain.get(linear.path, True))
            for linear in block.linears
        )

    groups: dict[tuple[int, tuple[Role, ...]], tuple[int, ...]] = {}
    for kind, block in enumerate(architecture.blocks):
        if alike:
            groups[kind, roles(block, block.paths[0])] = block.layers
            continue
        for layer, path in zip(block.layers, block.paths, strict=True):
            key = (kind, roles(block, path))
            groups[key] = (*groups.get(key, ()), layer)
    return Layout(
        groups=tuple(
            Group(block=architecture.blocks[kind], layers=layers, roles=same)
            for (kind, same), layers in groups.items()
        ),
        outside=tuple(
            role(linear, linear.path, True) for linear in architecture.linears
        ),
    )


def _adapted(
    architecture: Architecture, recipe: Recipe, *, alike: bool
) -> frozenset[str]:
    """Paths of the layers that are adapted; of layers that are alike, the first's.

    Where stacked experts are, PEFT passes by the linear layers of the same names.
    """
    if recipe.method == "full":
        return frozenset()
    left = NAMES if adapts_experts(architecture, recipe) else frozenset()
    if not alike:
        found = methods.adapted_linears(architecture, recipe)
        return frozenset(p for p, _ in found if p.rpartition(".")[2] not in left)
    found = methods.adapted_linears(architecture.one_of_each, recipe)
    return frozenset(p for p, _ in found if p.rpartition(".")[2] not in left)


def _tells_layers_apart(recipe: Recipe) -> bool:
    """Whether layers of one kind may differ: where a key names their numbers."""
    names = (
        *recipe.rank_pattern,
        *recipe.lambda_pattern,
        *recipe.unquantized_modules,
        *(recipe.targets if isinstance(recipe.targets, tuple) else ()),
    )
    return any(re.search(r"\d|\\", name) for name in names)


def _is_quantized(linear: Linear, path: str, recipe: Recipe) -> bool:
    """Whether transformers' quantiser takes a layer (`should_convert_module`).

    `lm_head` stands for the head whatever its name is.
    """
    if recipe.quantization == "none":
        return False
    if linear.kind == "head" and "lm_head" in recipe.unquantized_modules:
        return False
    return not any(
        re.match(rf"{name}\.", path) or re.match(name, path) or path.endswith(name)
        for name in recipe.unquantized_modules
    )
