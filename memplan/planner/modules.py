"""Which modules a plan decides on, one by one or in groups, and how PEFT is told.

A group is decided on as one. PEFT's patterns are regular expressions of module paths,
the first that matches counts, and one that matches nothing is passed over: so a plan
writes whole paths, escaped, of modules that exist.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from memplan import methods
from memplan.architecture import Architecture, Linear
from memplan.errors import UnknownNameError
from memplan.recipe import Recipe

Value = TypeVar("Value", int, float)

GRANULARITIES = ("uniform", "by-type", "by-layer", "by-module")
"""What shares a rank: every module, those of a name, those of a layer, or none."""

_LAYER = re.compile(r"(.*?)\.(\d+)\.(.*)")
"""A module's path: the stack, the position of the layer, and the path within it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Modules that get the same rank."""

    name: str
    paths: tuple[str, ...]
    linears: tuple[Linear, ...]
    """One a path."""

    @property
    def parameters_per_rank(self) -> int:
        """Parameters of a LoRA of rank 1 on every module."""
        return sum(one.in_features + one.out_features for one in self.linears)


def adapted_linears(architecture: Architecture, recipe: Recipe) -> dict[str, Linear]:
    """The linear layers whose rank a plan decides, by their paths.

    Routers and fused experts are PEFT's own matter and keep the recipe's rank. Raises
    UnknownNameError for a target that no layer's path ends with.
    """
    every = dict(architecture.all_linears())
    named = recipe.targets if isinstance(recipe.targets, tuple) else ()
    for name in named:
        if not any(f".{path}".endswith(f".{name}") for path in every):
            known = {path.rpartition(".")[2] for path in every}
            raise UnknownNameError("targets", name, sorted(known))
    found = dict(methods.adapted_linears(architecture, recipe))
    return {path: one for path, one in found.items() if named or one.kind != "router"}


def group(linears: Mapping[str, Linear], granularity: str) -> tuple[Group, ...]:
    """The groups of modules at one of GRANULARITIES."""
    if granularity not in GRANULARITIES:
        raise UnknownNameError("--ranks", granularity, GRANULARITIES)
    key_of: Mapping[str, Callable[[str], str]] = {
        "uniform": lambda path: "every module",
        "by-type": _type_of,
        "by-layer": _layer_of,
        "by-module": lambda path: path,
    }
    members: dict[str, list[str]] = defaultdict(list)
    for path in linears:
        members[key_of[granularity](path)].append(path)
    return tuple(
        Group(name=name, paths=tuple(paths), linears=tuple(linears[p] for p in paths))
        for name, paths in members.items()
    )


def with_ranks(recipe: Recipe, ranks: Mapping[str, int]) -> Recipe:
    """The recipe with a rank for each module path, alpha following the rank.

    The rank that most modules have is the recipe's own; the others are patterns. The
    scale alpha / r, or alpha / sqrt(r) for rsLoRA, stays as it was everywhere.
    """
    mode = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != mode}
    pattern = pattern_of(others)
    alphas = {key: _alpha(recipe, rank) for key, rank in pattern.items()}
    return _replaced(
        recipe,
        rank=mode,
        alpha=_alpha(recipe, mode),
        rank_pattern=pattern,
        alpha_pattern=alphas,
    )


def pattern_of(values: Mapping[str, Value]) -> dict[str, Value]:
    r"""PEFT's pattern that gives every path its value: whole paths, escaped.

    Layers that share the value of a module share a key: `model\.layers\.(0|1)\.mlp`.
    """
    places: dict[tuple[str, str, Value], list[str]] = defaultdict(list)
    for path, value in values.items():
        stack, layer, within = _split(path)
        places[stack, within, value].append(layer)
    return {_key(*place[:2], layers): place[2] for place, layers in places.items()}


def ranks_of(recipe: Recipe, paths: Iterable[str]) -> dict[str, int]:
    """The rank that PEFT gives each path."""
    return {path: methods.rank_at(recipe, path) for path in paths}


def alphas_of(recipe: Recipe, paths: Iterable[str]) -> dict[str, float]:
    """The alpha that PEFT gives each path."""
    return {path: methods.alpha_at(recipe, path) for path in paths}


def _alpha(recipe: Recipe, rank: int) -> float:
    """The alpha that keeps the scale of the recipe's adapters at another rank."""
    power = 0.5 if recipe.method == "rslora" else 1.0
    alpha: float = recipe.alpha * (rank / recipe.rank) ** power
    return round(alpha, 6)


def _replaced(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe.from_mapping(recipe.to_json() | changes)


def _split(path: str) -> tuple[str, str, str]:
    """Stack, layer and path within it; the first is empty outside of layers."""
    found = _LAYER.fullmatch(path)
    return found.group(1, 2, 3) if found else ("", "", path)  # type: ignore[return-value]


def _type_of(path: str) -> str:
    stack, _, within = _split(path)
    return f"{stack}.*.{within}" if stack else within


def _layer_of(path: str) -> str:
    stack, layer, within = _split(path)
    return f"{stack}.{layer}" if stack else within


def _key(stack: str, within: str, layers: Sequence[str]) -> str:
    if not stack:
        return re.escape(within)
    position = layers[0] if len(layers) == 1 else f"({'|'.join(layers)})"
    return rf"{re.escape(stack)}\.{position}\.{re.escape(within)}"
