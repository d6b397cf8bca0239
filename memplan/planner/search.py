"""The search of a recipe: all combinations of knobs by the estimate, then the ranks.

Combinations are judged at their smallest ranks first; of those that fit, the ranks that
all modules could share say how much room is left. The best few are ranked module by
module, and the first that its verification upholds is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memplan.architecture import Architecture, Linear
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.gpu import Gpu, find_gpu
from memplan.planner import choices
from memplan.planner.choices import PREFERENCES, Estimate, Floors
from memplan.planner.modules import adapted_linears, group, with_ranks
from memplan.planner.ranks import ROBUST, Ranked, RankSearch, lost_share, menu
from memplan.planner.speed import StepCost, step_cost
from memplan.recipe import Recipe

QUALITY_TOLERANCE = 0.02
"""Shares of the adapters' worth that count as the same quality."""

MOST_FINALISTS = 4
"""Recipes that are ranked and verified before the search gives up on a length."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What is asked for."""

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
    prior: str = ROBUST
    ranks: tuple[int, ...] = choices.RANKS

    def run(self) -> Found:
        """The best recipe; raises InputError where nothing fits."""
        rejected = 0
        for length in self._lengths():
            for quantization in choices.quantizations(self.base, self.given):
                made = [*self._recipes(quantization, length)]
                fitting = [one for one in map(self.candidate, made) if one is not None]
                rejected += len(made) - len(fitting)
                found = self._best(fitting, rejected)
                if found is not None:
                    return found
        raise self._refusal()

    def candidate(self, recipe: Recipe) -> Candidate | None:
        """The recipe at the largest rank that all can share; None if none fits."""
        if not self._adapts:
            footprint = self.estimate(recipe)
            return (
                self._judged(recipe, footprint, {}) if self._fits(footprint) else None
            )
        best = None
        for rank in self._menu:
            shared = dict.fromkeys(self._linears, rank)
            ranked = with_ranks(recipe, shared)
            footprint = self.estimate(ranked)
            if not self._fits(footprint):
                break
            best = self._judged(ranked, footprint, shared)
        return best

    def smallest(self) -> Recipe:
        """The combination within the floors that takes the least."""
        length = self._lengths()[-1]
        quantization = choices.quantizations(self.base, self.given)[-1]
        made = [*self._recipes(quantization, length)]
        return min(
            (self._at_smallest(recipe) for recipe in made),
            key=lambda recipe: self.estimate(recipe).life_peak.reserved_bytes,
        )

    def key(self, best_lost: float) -> Callable[[Candidate], tuple[float, ...]]:
        """The order of aims beyond fitting, the lowest first."""

        def order(one: Candidate) -> tuple[float, ...]:
            worse = max(0.0, one.lost_share - best_lost - QUALITY_TOLERANCE)
            aims = {
                "quality": (worse, one.seconds_per_token),
                "length": (worse, one.seconds_per_token),
                "speed": (one.seconds_per_token, worse),
            }
            return (*aims[self.prefer], one.reserved_bytes)

        return order

    def _best(self, fitting: list[Candidate], rejected: int) -> Found | None:
        """The first of the best few that is upheld."""
        if not fitting:
            return None
        best_lost = min(one.lost_share for one in fitting)
        ordered = sorted(fitting, key=self.key(best_lost))
        for one in ordered[:MOST_FINALISTS]:
            upheld = self._upheld(one)
            if upheld is not None:
                candidate, ranked = upheld
                return Found(
                    ranked=ranked,
                    candidate=candidate,
                    considered=tuple(ordered),
                    num_rejected=rejected,
                )
        return None

    def _upheld(self, one: Candidate) -> tuple[Candidate, Ranked | None] | None:
        """The candidate with its ranks, tightened until its verification fits."""
        budget_bytes = self._budget_bytes
        for _ in range(MOST_FINALISTS):
            ranked = self._ranked(one.recipe, budget_bytes)
            if self._adapts and ranked is None:
                return None
            recipe = one.recipe if ranked is None else ranked.recipe
            verified = self.verify(recipe)
            if self._fits(verified):
                judged = dataclasses.replace(one, recipe=recipe, footprint=verified)
                kept = ranked and dataclasses.replace(ranked, footprint=verified)
                return judged, kept
            if ranked is None:
                return None
            budget_bytes -= max(1, self._excess(verified))
        return None

    def _ranked(self, recipe: Recipe, budget_bytes: int) -> Ranked | None:
        if not self._adapts:
            return None
        groups = group(self._linears, self.granularity)
        return RankSearch(
            recipe=recipe,
            groups=groups,
            estimate=self.estimate,
            budget_bytes=budget_bytes,
            ranks=self._menu,
            prior=self.prior,
        ).run()

    def _judged(
        self, recipe: Recipe, footprint: Footprint, ranks: Mapping[str, int]
    ) -> Candidate:
        return Candidate(
            recipe=recipe,
            footprint=footprint,
            lost_share=lost_share(self._linears, ranks) if ranks else 0.0,
            cost=step_cost(self.architecture, recipe, rated(self.gpu)),
        )

    def _recipes(self, quantization: str, length: int) -> Iterator[Recipe]:
        return choices.recipes(self.base, self.given, self.floors, quantization, length)

    def _at_smallest(self, recipe: Recipe) -> Recipe:
        if not self._adapts:
            return recipe
        return with_ranks(recipe, dict.fromkeys(self._linears, self._menu[0]))

    def _lengths(self) -> tuple[int, ...]:
        return choices.lengths(
            self.architecture, self.base, self.given, self.floors, self.prefer
        )

    def _fits(self, footprint: Footprint) -> bool:
        return footprint.failed_moment is None and self._excess(footprint) <= 0

    def _excess(self, footprint: Footprint) -> int:
        reserved = footprint.life_peak.reserved_bytes
        return max(reserved - self._budget_bytes, footprint.missing_bytes)

    @property
    def _budget_bytes(self) -> int:
        return self.gpu.budget_bytes - self.floors.margin_bytes

    @property
    def _adapts(self) -> bool:
        return self.base.method != "full"

    @property
    def _linears(self) -> dict[str, Linear]:
        return adapted_linears(self.architecture, self.base)

    @property
    def _menu(self) -> tuple[int, ...]:
        groups = group(self._linears, self.granularity)
        if "rank" in self.given:
            return (self.base.rank,)
        return menu(groups, self.ranks, self.floors.rank)

    def _refusal(self) -> InputError:
        smallest = self.smallest()
        excess = self._excess(self.estimate(smallest))
        return InputError(
            "--gpu",
            self.gpu.name,
            f"is too small: the smallest recipe within the floors needs {excess} bytes "
            "more",
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
