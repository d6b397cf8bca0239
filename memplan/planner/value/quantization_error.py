"""T1: what quantising a layer costs, by its weights: ||W - Q(W)||^2.

It decides which layers are worth leaving in 16 bits, and nothing about ranks. What can
be exported of it is the list of modules that the quantiser passes over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from memplan.recipe import Recipe

QUANTIZED, UNQUANTIZED = 0, 1
"""The choices of a group, in their order."""


def losses(
    errors: Mapping[str, float], groups: Sequence[Sequence[str]]
) -> list[list[float]]:
    """(groups, 2): the squared error of a group's modules, and none where spared."""
    return [[sum(errors[path] for path in group), 0.0] for group in groups]


def with_spared(recipe: Recipe, paths: Iterable[str]) -> Recipe:
    """The recipe with those modules left unquantised, besides what was."""
    spared = (*recipe.unquantized_modules, *paths)
    named = list(dict.fromkeys(spared))
    return Recipe.from_mapping(recipe.to_json() | {"unquantized_modules": named})
