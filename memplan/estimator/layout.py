"""Which linear layers a recipe adapts and quantises, and at which rank."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memplan.architecture import Architecture, Block, Linear
from memplan.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """What becomes of a linear layer."""

    linear: Linear
    adapted: bool
    quantized: bool
    rank: Any
    """Rank of its adapter, a number or an array; 0 without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """Layers of one kind whose linear layers have the same roles."""

    block: Block
    count: int
    roles: tuple[Role, ...]


def layers_of(architecture: Architecture, recipe: Recipe) -> tuple[Layers, ...]:
    """All layers, gathered by kind and by the ranks that a pattern gives them."""
    return tuple(
        Layers(block=block, count=count, roles=roles)
        for block in architecture.blocks
        for roles, count in _grouped(block, recipe)
    )


def roles_outside(architecture: Architecture, recipe: Recipe) -> tuple[Role, ...]:
    """The linear layers outside of blocks, the head among them."""
    return tuple(
        _role(linear, linear.path, recipe) for linear in architecture.linears
    )


def _grouped(
    block: Block, recipe: Recipe
) -> Iterator[tuple[tuple[Role, ...], int]]:
    if not (recipe.rank_pattern or _names_layers(recipe)):
        yield _roles(block, block.paths[0], recipe), len(block.layers)
        return
    counts: dict[tuple[Role, ...], int] = {}
    for path in block.paths:
        roles = _roles(block, path, recipe)
        counts[roles] = counts.get(roles, 0) + 1
    yield from counts.items()


def _names_layers(recipe: Recipe) -> bool:
    names = (
        *recipe.unquantized_modules,
        *(recipe.targets if isinstance(recipe.targets, tuple) else ()),
    )
    return any(re.search(r"\d", name) for name in names)


def _roles(block: Block, path: str, recipe: Recipe) -> tuple[Role, ...]:
    return tuple(
        _role(linear, f"{path}.{linear.path}", recipe) for linear in block.linears
    )


def _role(linear: Linear, path: str, recipe: Recipe) -> Role:
    adapted = is_adapted(linear, path, recipe)
    return Role(
        linear=linear,
        adapted=adapted,
        quantized=recipe.quantization != "none" and not _is_skipped(linear, path, recipe),
        rank=rank_of(path, recipe) if adapted else 0,
    )


def is_adapted(linear: Linear, path: str, recipe: Recipe) -> bool:
    """Whether an adapter stands beside a layer: by kind, or by the end of its path."""
    if recipe.method == "full":
        return False
    if recipe.targets == "all-linear":
        return linear.kind != "head"
    if isinstance(recipe.targets, str):
        return linear.kind == recipe.targets
    return any(f".{path}".endswith(f".{name}") for name in recipe.targets)


def rank_of(path: str, recipe: Recipe) -> Any:
    """The rank that a pattern gives a layer (peft.utils.get_pattern_key)."""
    for pattern, rank in recipe.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return rank
    return recipe.rank


def _is_skipped(linear: Linear, path: str, recipe: Recipe) -> bool:
    """Whether transformers' quantiser leaves a layer alone (should_convert_module)."""
    if linear.kind == "head" and "lm_head" in recipe.unquantized_modules:
        return True
    return any(
        re.match(rf"{name}\.", path) or re.match(name, path) or path.endswith(name)
        for name in recipe.unquantized_modules
    )
