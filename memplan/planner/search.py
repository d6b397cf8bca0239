"""The search of a recipe: all combinations of knobs by the estimate, then the ranks.

Combinations are judged at their smallest ranks first; of those that fit, the ranks that
all modules could share say how much room is left. The best few are ranked module by
module, and the first that its verification upholds is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from memplan.architecture import Architecture, Linear
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.gpu import Gpu, find_gpu
from memplan.planner import choices
from memplan.planner.choices import PREFERENCES, Estimate, Floors
from memplan.planner.modules import Group, adapted_linears, group, with_ranks
from memplan.planner.ranks import DEFAULT_PRIOR, Ranked, RankSearch, lost_share, menu
from memplan.planner.speed import StepCost, step_cost
from memplan.recipe import Recipe
from memplan.units import format_bytes

QUALITY_TOLERANCE = 0.02
"""Shares of the adapters' worth that count as the same quality."""

TIME_TOLERANCE = 0.02
"""Shares of a step's time that count as the same: the roofline knows no better."""

SHAPING_KEYS = ("checkpointing", "every_n_layers", "offload", "loss")
"""Keys that decide what a step keeps, and so how far an estimate may be off."""

MOST_FINALISTS = 6
"""Recipes that are ranked and verified before the search gives up on a length."""

MOST_TIGHTENINGS = 2
"""Times that a finalist is ranked, before it is verified at the smallest ranks."""

RATES_OF = "RTX 3060"
"""Whose bf16 rate and bandwidth stand for those of a card that has none known: it is of
the capability that a bare size stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A recipe that was looked at, at the largest rank that all modules can share."""

    recipe: Recipe
    footprint: Footprint
    lost_share: float
    """By memplan.planner.ranks; 0 where nothing is adapted."""
    cost: StepCost

    @property
    def seconds_per_token(self) -> float:
        return 1 / self.cost.tokens_per_second

    @property
    def reserved_bytes(self) -> int:
        return self.footprint.life_peak.reserved_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The recipe that was chosen, and what else was looked at."""

    ranked: Ranked | None
    """None for a method without adapters."""
    candidate: Candidate
    considered: tuple[Candidate, ...]
    """Every candidate that fits, the chosen one among them."""
    num_rejected: int
    """Combinations that do not fit even at the smallest ranks."""

    @property
    def recipe(self) -> Recipe:
        return self.candidate.recipe if self.ranked is None else self.ranked.recipe


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is asked for. It has no slots, so that what is derived is derived once."""

    architecture: Architecture
    gpu: Gpu
    base: Recipe
    given: Collection[str]
    """The recipe's keys that the user settled."""
    estimate: Estimate
    verify: Callable[[Recipe], Footprint]
    """What has the last word, such as a simulation on the card."""
    floors: Floors
    prefer: str = PREFERENCES[0]
    granularity: str = "by-type"
    prior: str = DEFAULT_PRIOR
    ranks: tuple[int, ...] = choices.RANKS

    def run(self) -> Found:
        """The best recipe; raises InputError where nothing fits."""
        rejected = 0
        for length in self._lengths():
            for quantization in choices.quantizations(self.base, self.given):
                made = [*self._recipes(quantization, length)]
                tried = made if self._loads(made) else []
                fitting = [one for one in map(self.candidate, tried) if one is not None]
                rejected += len(made) - len(fitting)
                found = self._best(fitting, rejected)
                if found is not None:
                    return found
        raise self._refusal(rejected)

    def candidate(self, recipe: Recipe) -> Candidate | None:
        """The recipe at the largest rank that all can share; None if none fits."""
        fitting = self._last_that_fits(recipe)
        if fitting is None:
            return None
        best, footprint = fitting
        ranks = dict.fromkeys(self._linears, best.rank)
        return Candidate(
            recipe=best,
            footprint=footprint,
            lost_share=lost_share(self._linears, ranks) if ranks else 0.0,
            cost=step_cost(self.architecture, best, self._rated),
        )

    def _last_that_fits(self, recipe: Recipe) -> tuple[Recipe, Footprint] | None:
        """The recipe at the last rank of the menu that fits, by halving."""
        made = self._smallest_of(recipe)
        try:
            footprint = self.estimate(made)
        except InputError as error:
            # Another combination may run where this one cannot.
            self._refused.append(error)
            return None
        if not self._fits(footprint):
            return None
        best, low, high = (made, footprint), 0, len(self._menu)
        while high - low > 1:
            middle = (low + high) // 2
            made = self._shared(recipe, self._menu[middle])
            footprint = self.estimate(made)
            if self._fits(footprint):
                best, low = (made, footprint), middle
            else:
                high = middle
        return best

    def smallest(self) -> Recipe:
        """The combination within the floors that takes the least."""
        length = self._lengths()[-1]
        quantization = choices.quantizations(self.base, self.given)[-1]
        made = [*self._recipes(quantization, length)]
        return min(map(self._smallest_of, made), key=self._reserved)

    def _loads(self, made: list[Recipe]) -> bool:
        """Whether the weights fit, which no other knob changes."""
        try:
            moments = self.estimate(self._smallest_of(made[0])).moments
        except InputError:
            return True
        loaded = (m.reserved_bytes for m in moments if m.label == "load")
        return max(loaded, default=0) <= self._budget_bytes

    def _smallest_of(self, recipe: Recipe) -> Recipe:
        """The recipe at the smallest ranks."""
        return self._shared(recipe, self._menu[0]) if self._menu else recipe

    def _reserved(self, recipe: Recipe) -> float:
        """The reserved peak; infinite for a recipe that cannot run."""
        try:
            return self.estimate(recipe).life_peak.reserved_bytes
        except InputError:
            return math.inf

    def ordered(self, fitting: Iterable[Candidate]) -> list[Candidate]:
        """The candidates by the aims beyond fitting, the best first.

        Qualities and times within their tolerances are alike; then the recipe that
        departs the least from what is usual, and the one of the least memory.
        """
        found = list(fitting)
        best_lost = min(one.lost_share for one in found)
        as_good = [one for one in found if self._worse(one, best_lost) == 0]
        rivals = found if self.prefer == "speed" else as_good
        fastest = min(one.seconds_per_token for one in rivals)

        def order(one: Candidate) -> tuple[float, ...]:
            worse = self._worse(one, best_lost)
            slower = max(0.0, one.seconds_per_token / fastest - 1 - TIME_TOLERANCE)
            aims = (slower, worse) if self.prefer == "speed" else (worse, slower)
            return (
                *aims,
                choices.departures(one.recipe, self.base),
                one.reserved_bytes,
            )

        return sorted(found, key=order)

    def _worse(self, one: Candidate, best_lost: float) -> float:
        return max(0.0, one.lost_share - best_lost - QUALITY_TOLERANCE)

    def _best(self, fitting: list[Candidate], rejected: int) -> Found | None:
        """The first of the best few that its verification upholds.

        A finalist that fails says how far the estimate is off for its checkpointing
        and loss, and spares those of the same that are no smaller by as much.
        """
        if not fitting:
            return None
        ordered = self.ordered(fitting)
        limits: dict[tuple[Any, ...], float] = {}
        tried = 0
        for one in ordered:
            smallest = self._smallest_of(one.recipe)
            needed = self.estimate(smallest).life_peak.reserved_bytes
            kind = tuple(getattr(one.recipe, key) for key in SHAPING_KEYS)
            if needed > limits.get(kind, math.inf) or tried == MOST_FINALISTS:
                continue
            tried += 1
            ranked, verified = self._upheld(one)
            if self._fits(verified):
                recipe = one.recipe if ranked is None else ranked.recipe
                return Found(
                    ranked=ranked,
                    candidate=dataclasses.replace(
                        one, recipe=recipe, footprint=verified
                    ),
                    considered=tuple(ordered),
                    num_rejected=rejected,
                )
            limits[kind] = needed - self._excess(verified)
        return None

    def _upheld(self, one: Candidate) -> tuple[Ranked | None, Footprint]:
        """The candidate's ranks and what verifying them says, the smallest at last."""
        if not self._linears:
            return None, self.verify(one.recipe)
        budget_bytes = self._budget_bytes
        for _ in range(MOST_TIGHTENINGS):
            ranked = self._ranked(one.recipe, budget_bytes, self._menu)
            if ranked is None:
                break
            verified = self.verify(ranked.recipe)
            if self._fits(verified):
                return ranked, verified
            budget_bytes -= self._excess(verified)
        ranked = self._ranked(one.recipe, self._budget_bytes, self._menu[:1])
        verified = self.verify(self._smallest_of(one.recipe))
        return ranked, verified

    def _ranked(
        self, recipe: Recipe, budget_bytes: int, ranks: tuple[int, ...]
    ) -> Ranked | None:
        return RankSearch(
            recipe=recipe,
            groups=self._groups,
            estimate=self.estimate,
            budget_bytes=budget_bytes,
            ranks=ranks,
            prior=self.prior,
        ).run()

    def _recipes(self, quantization: str, length: int) -> Iterator[Recipe]:
        return choices.recipes(self.base, self.given, self.floors, quantization, length)

    def _shared(self, recipe: Recipe, rank: int) -> Recipe:
        return with_ranks(recipe, dict.fromkeys(self._linears, rank))

    def _lengths(self) -> tuple[int, ...]:
        return choices.lengths(
            self.architecture, self.base, self.given, self.floors, self.prefer
        )

    def _fits(self, footprint: Footprint) -> bool:
        return self._excess(footprint) <= 0

    def _excess(self, footprint: Footprint) -> int:
        """Bytes beyond the budget; at least 1 where memory ran out."""
        if footprint.failed_moment is not None:
            return max(footprint.missing_bytes, 1)
        return footprint.life_peak.reserved_bytes - self._budget_bytes

    @functools.cached_property
    def _budget_bytes(self) -> int:
        return self.gpu.budget_bytes - self.floors.margin_bytes

    @functools.cached_property
    def _linears(self) -> dict[str, Linear]:
        """What is adapted; nothing where everything is trained."""
        if self.base.method == "full":
            return {}
        return adapted_linears(self.architecture, self.base)

    @functools.cached_property
    def _groups(self) -> tuple[Group, ...]:
        return group(self._linears, self.granularity)

    @functools.cached_property
    def _menu(self) -> tuple[int, ...]:
        if not self._linears:
            return ()
        if "rank" in self.given:
            return (self.base.rank,)
        return menu(self._groups, self.ranks, self.floors.rank)

    @functools.cached_property
    def _rated(self) -> Gpu:
        return rated(self.gpu)

    @functools.cached_property
    def _refused(self) -> list[InputError]:
        """What was said of combinations that cannot run."""
        return []

    def _refusal(self, num_rejected: int) -> InputError:
        """What is missing; or why none runs, where that is it."""
        if len(self._refused) == num_rejected:
            return self._refused[-1]
        smallest = self.smallest()
        excess = self._excess(self.estimate(smallest))
        if excess <= 0:
            excess = self._excess(self.verify(smallest))
        return InputError(
            "--gpu",
            self.gpu.name,
            "is too small: the smallest recipe within the floors lacks "
            f"{format_bytes(excess)}",
            "see `memplan why-not`",
        )


def rated(gpu: Gpu) -> Gpu:
    """The card, with another's rates where its own are not known."""
    if gpu.bf16_dense_tflops is not None and gpu.memory_bandwidth_gbps is not None:
        return gpu
    other = find_gpu(RATES_OF)
    return dataclasses.replace(
        gpu,
        bf16_dense_tflops=other.bf16_dense_tflops,
        memory_bandwidth_gbps=other.memory_bandwidth_gbps,
    )


def front(considered: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in memory, length, capacity and speed."""
    kept: list[Candidate] = []
    for one in considered:
        if not any(_beats(other, one) for other in kept):
            kept = [other for other in kept if not _beats(one, other)] + [one]
    return sorted(kept, key=lambda one: one.reserved_bytes)


def _beats(one: Candidate, other: Candidate) -> bool:
    """Whether one is as good in everything and better in something."""
    ours, theirs = _axes(one), _axes(other)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _axes(one: Candidate) -> tuple[Any, ...]:
    return (
        one.reserved_bytes,
        -one.recipe.sequence_length,
        one.lost_share,
        one.seconds_per_token,
    )
