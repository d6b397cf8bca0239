"""Why a recipe does not fit, and what would change that: every knob by the estimate."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.planner.choices import (
    CHECKPOINTING,
    LOSSES,
    OPTIMIZERS,
    QUANTIZATIONS,
    Estimate,
    excess_bytes,
    with_keys,
)
from memplan.planner.modules import adapted_linears, ranks_of, with_ranks
from memplan.planner.search import rated
from memplan.planner.speed import step_cost
from memplan.recipe import Recipe
from memplan.units import GIB

LITTLE_SHARE = 0.01
"""A change that saves less of the peak than this does not help."""

LENGTH_STEP = 64
"""Tokens: lengths are looked at in these steps."""

LONGEST = 2**20
"""Tokens beyond which no length is looked at."""

MOST_FIXES = 8
"""Changes that make it fit of which more are not looked for."""

ESTIMATE_ERROR = 0.03
"""The estimate's worst error beside the simulation, as its tests hold it to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What changing a key or two does to a recipe."""

    changes: Mapping[str, Any]
    """The keys, and what they become; ranks are given as `rank` alone."""
    recipe: Recipe
    saved_bytes: int
    """Of the reserved peak; negative where it takes more."""
    missing_bytes: int
    """What the card lacks with it; at most 0 where it fits."""
    speed: float
    """Tokens a second beside those without it."""

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0

    def to_json(self) -> dict[str, Any]:
        return {
            "changes": dict(self.changes),
            "saved_bytes": self.saved_bytes,
            "missing_bytes": max(0, self.missing_bytes),
            "fits": self.fits,
            "speed": self.speed,
        }


@dataclass(frozen=True, kw_only=True)
class Question:
    """A recipe on a card. It has no slots, so that what is derived is derived once."""

    architecture: Architecture
    recipe: Recipe
    gpu: Gpu
    estimate: Estimate
    """What every change is asked of."""
    confirm: Estimate | None = None
    """What verdicts are asked of, where it takes more time than the estimate."""

    @functools.cached_property
    def footprint(self) -> Footprint:
        return self.estimate(self.recipe)

    @functools.cached_property
    def confirmed(self) -> Footprint:
        """The footprint that the verdict is of."""
        return self.footprint if self.confirm is None else self.confirm(self.recipe)

    @property
    def missing_bytes(self) -> int:
        """What the card lacks; at most 0 where the recipe fits."""
        return self._missing(self.confirmed)

    @functools.cached_property
    def single_changes(self) -> tuple[Change, ...]:
        """Every change of one knob, that which saves the most first."""
        found = [self._changed(*one) for one in self._knobs()]
        kept = (one for one in found if one is not None)
        return tuple(sorted(kept, key=lambda one: -one.saved_bytes))

    @property
    def fixes(self) -> tuple[Change, ...]:
        """Single changes that make it fit, the fastest first; else pairs of changes.

        Of those that are confirmed, the first MOST_FIXES.
        """
        found = tuple(islice(self._holding(self.single_changes), MOST_FIXES))
        return found or tuple(islice(self._holding(self._pairs()), MOST_FIXES))

    def _holding(self, changes: Iterable[Change]) -> Iterator[Change]:
        """The changes that make it fit, the fastest first."""
        fitting = [one for one in changes if one.fits]
        for one in sorted(fitting, key=lambda one: (-one.speed, -one.saved_bytes)):
            if self.confirm is None:
                yield one
                continue
            missing = self._missing(self.confirm(one.recipe))
            if missing <= 0:
                yield dataclasses.replace(one, missing_bytes=missing)

    @property
    def of_little_help(self) -> tuple[Change, ...]:
        """Changes that save next to nothing, though many expect them to."""
        least = LITTLE_SHARE * self.footprint.life_peak.reserved_bytes
        return tuple(one for one in self.single_changes if one.saved_bytes < least)

    @functools.cached_property
    def floor(self) -> Footprint:
        """The footprint with every single change that saves made at once."""
        changes: dict[str, Any] = {}
        recipe = self.recipe
        for one in self.single_changes:
            if one.saved_bytes > 0 and not one.changes.keys() & changes.keys():
                changed = self._made(recipe, one.changes)
                if changed is not None:
                    recipe = changed
                    changes |= one.changes
        found = [self.footprint, self._asked(recipe) or self.footprint]
        return min(found, key=lambda one: one.life_peak.reserved_bytes)

    def longest(self, more_bytes: int = 0) -> int | None:
        """The longest sequence that fits with so many bytes more; None if none does."""
        limit = LONGEST
        if self.architecture.learned_positions and self.architecture.max_positions:
            limit = self.architecture.max_positions

        def fits(steps: int) -> bool:
            made = self._made(self.recipe, {"sequence_length": steps * LENGTH_STEP})
            asked = None if made is None else self._asked(made)
            return asked is not None and self._missing(asked) <= more_bytes

        steps = _largest(fits, limit // LENGTH_STEP)
        return steps * LENGTH_STEP if steps else None

    def next_gib(self) -> tuple[int | None, int | None]:
        """The longest sequence as the card is, and with one GiB more."""
        return self.longest(), self.longest(GIB)

    def doubts(self) -> Iterator[str]:
        """What could turn the verdict, and what would settle it."""
        margin = abs(self.missing_bytes)
        error = int(ESTIMATE_ERROR * self.confirmed.life_peak.reserved_bytes)
        if margin <= error:
            yield (
                "The verdict is within the estimate's error: `memplan simulate` "
                "settles it."
            )
        if margin <= self.gpu.context_bytes and self.gpu.assumptions:
            yield (
                "The verdict is within the size of the CUDA context, which is a "
                "reading of another machine: measure yours and give --context."
            )

    def _missing(self, footprint: Footprint) -> int:
        return excess_bytes(footprint, self.gpu.budget_bytes)

    def _knobs(self) -> Iterator[tuple[dict[str, Any], Recipe | None]]:
        """Single changes, each with the recipe that it makes."""
        for changes in _menu(self.recipe):
            yield changes, self._made(self.recipe, changes)

    def _made(self, recipe: Recipe, changes: Mapping[str, Any]) -> Recipe | None:
        """The recipe with the changes; None where a recipe cannot have them."""
        others = {key: value for key, value in changes.items() if key != "rank"}
        try:
            # Presets follow the quantisation only where they were not changed.
            given = [k for k in recipe.to_json() if not _follows(recipe, k)]
            made = with_keys(recipe, given, others) if others else recipe
            return self._at_rank(made, changes["rank"]) if "rank" in changes else made
        except InputError:
            return None

    def _at_rank(self, recipe: Recipe, rank: int) -> Recipe:
        """The recipe with its ranks scaled so that the recipe's own becomes `rank`."""
        linears = adapted_linears(self.architecture, recipe)
        ranks = ranks_of(recipe, linears)
        share = rank / recipe.rank
        return with_ranks(
            recipe, {path: max(1, int(one * share)) for path, one in ranks.items()}
        )

    def _asked(self, recipe: Recipe) -> Footprint | None:
        """The estimate; None for a recipe that cannot run."""
        try:
            return self.estimate(recipe)
        except InputError:
            return None

    def _changed(self, changes: dict[str, Any], recipe: Recipe | None) -> Change | None:
        footprint = None if recipe is None else self._asked(recipe)
        if recipe is None or footprint is None:
            return None
        before = self.footprint.life_peak.reserved_bytes
        return Change(
            changes=changes,
            recipe=recipe,
            saved_bytes=before - footprint.life_peak.reserved_bytes,
            missing_bytes=self._missing(footprint),
            speed=self._cost(recipe) / self._own_cost,
        )

    @functools.cached_property
    def _own_cost(self) -> float:
        return self._cost(self.recipe)

    def _cost(self, recipe: Recipe) -> float:
        return step_cost(self.architecture, recipe, rated(self.gpu)).tokens_per_second

    def _pairs(self) -> Iterator[Change]:
        """Two changes at once, of those that save something by themselves."""
        saving = [one for one in self.single_changes if one.saved_bytes > 0]
        for one, other in itertools.combinations(saving, 2):
            if one.changes.keys() & other.changes.keys():
                continue
            changes = {**one.changes, **other.changes}
            found = self._changed(changes, self._made(self.recipe, changes))
            if found is not None:
                yield found


def rejected(changes: Iterable[Change]) -> Iterator[Change]:
    """The changes that would be faster and do not fit."""
    for one in changes:
        if not one.fits and one.speed > 1:
            yield one


def _follows(recipe: Recipe, key: str) -> bool:
    """Whether a key is as the presets of the recipe's trainer have it."""
    fresh = Recipe(trainer=recipe.trainer, quantization=recipe.quantization)
    return bool(getattr(fresh, key) == getattr(recipe, key))


def _menu(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Every change of one knob."""
    yield from _differing(recipe, _one_by_one("quantization", QUANTIZATIONS[1:]))
    yield from _differing(recipe, ({**_NO_OFFLOAD, **one} for one in CHECKPOINTING))
    losses = LOSSES.get(recipe.trainer, ())
    yield from _differing(recipe, _one_by_one("loss", losses))
    yield from _differing(recipe, _one_by_one("optimizer", OPTIMIZERS))
    if recipe.method != "full":
        halves = [recipe.rank // 2] if recipe.rank > 1 else []
        yield from _one_by_one("rank", halves)
        yield from _differing(recipe, _one_by_one("adapter_dtype", ["bfloat16"]))
        yield from _differing(recipe, _one_by_one("input_casts", [False]))
        yield from _differing(recipe, _one_by_one("dropout", [0.0]))
    if recipe.batch_size % 2 == 0:
        yield {
            "batch_size": recipe.batch_size // 2,
            "accumulation": recipe.accumulation * 2,
        }
    if recipe.sequence_length > LENGTH_STEP:
        yield {"sequence_length": recipe.sequence_length // 2}


_NO_OFFLOAD = {"every_n_layers": 1, "offload": False}


def _one_by_one(key: str, values: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for value in values:
        yield {key: value}


def _differing(
    recipe: Recipe, found: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The changes that change anything, without the keys that they leave."""
    for changes in found:
        new = {k: v for k, v in changes.items() if getattr(recipe, k) != v}
        if new:
            yield new


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest count up to a limit that fits, by halving; 0 where 1 does not."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, min(2 * high, limit)
    if high == limit and fits(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
