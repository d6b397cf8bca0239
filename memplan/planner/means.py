"""What is known of a recipe on the card: by the closed form, the replay, and more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memplan import estimator
from memplan.architecture import Architecture
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.planner.choices import Estimate
from memplan.recipe import Recipe

SCREEN_PRECISION = 4
"""What a screened recipe lacks is found to one part in so many: every halving is a
replay of all layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """The ways to ask what a recipe takes, from the fastest to the most exact."""

    estimate: Estimate
    """The closed form."""
    screen: Estimate
    """The same with its blocks replayed, within the budget less the margin."""
    verify: Estimate | None
    """What has the last word, likewise; None where the screen has it."""
    parameters: Callable[[Recipe], Mapping[str, int]]
    """`total` and `trainable`."""


def means_on(
    architecture: Architecture,
    gpu: Gpu,
    margin_bytes: int,
    verify: Estimate | None = None,
) -> Means:
    """The estimator's means on a card, and what verifies its answers."""

    def replayed(recipe: Recipe, card: Gpu) -> Footprint:
        found = estimator.run(architecture, recipe, card)
        return estimator.replayed(
            found, card, missing_precision=SCREEN_PRECISION
        ).footprint

    return Means(
        estimate=estimate_on(architecture, gpu),
        screen=less_margin(gpu, margin_bytes, replayed),
        verify=verify,
        parameters=lambda recipe: estimator.run(architecture, recipe, gpu).parameters,
    )


def estimate_on(architecture: Architecture, gpu: Gpu) -> Estimate:
    """The closed form's footprint of a recipe on the card."""
    return lambda recipe: estimator.run(architecture, recipe, gpu).footprint


def less_margin(
    gpu: Gpu, margin_bytes: int, read: Callable[[Recipe, Gpu], Footprint]
) -> Estimate:
    """Footprints read within the budget less a margin, and told of the whole card."""
    kept_back = gpu.reserve_bytes + margin_bytes
    tighter = dataclasses.replace(gpu, reserve_bytes=kept_back)
    capacity_bytes = gpu.budget_bytes + gpu.context_bytes

    def of(recipe: Recipe) -> Footprint:
        found = read(recipe, tighter)
        return dataclasses.replace(found, capacity_bytes=capacity_bytes)

    return of
