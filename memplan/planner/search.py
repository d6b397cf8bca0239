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

from memplan import methods
from memplan.architecture import Architecture, Linear
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.gpu import Gpu, find_gpu
from memplan.planner import choices
from memplan.planner.bits import BitSearch
from memplan.planner.choices import (
    LENGTH_STEP,
    PREFERENCES,
    Estimate,
    Floors,
    excess_bytes,
)
from memplan.planner.modules import Group, adapted_linears, group, with_ranks
from memplan.planner.ranks import (
    DEFAULT_PRIOR,
    QUALITY_TOLERANCE,
    Ranked,
    RankSearch,
    lost_share,
    menu,
)
from memplan.planner.speed import StepCost, step_cost
from memplan.recipe import Recipe
from memplan.units import format_bytes
from memplan.values import Values

TIME_TOLERANCE = 0.02
"""Shares of a step's time that count as the same: the roofline knows no better."""

SHAPING_KEYS = ("quantization", "checkpointing", "every_n_layers", "offload")
"""Keys that decide what a step keeps, and so how far an estimate may be off."""

CAUTION = 1.1
"""What is missing is taken to be so many times as much: other ranks lie otherwise in
the allocator's segments."""

Kind = tuple[Any, ...]
"""A recipe's values of SHAPING_KEYS."""

MOST_FINALISTS = 6
"""Recipes of a length and a scheme that are ranked and verified."""

DOUBTED_SHARE = 0.1
"""The share of the budget beyond which no estimate is doubted that says a recipe does
not fit: three times the estimate's bar beside the simulation at worst."""

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
        return self.candidate.recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Upheld:
    """What verifying a candidate said."""

    ranked: Ranked | None
    candidate: Candidate
    """With its ranks and its verified footprint."""
    estimated_bytes: int
    excess_bytes: int
    """What it takes beyond the budget; at most 0 where it is upheld."""


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
    screen: Estimate | None = None
    """What a recipe has to pass before it is verified, for it takes less time."""
    floors: Floors
    prefer: str = PREFERENCES[0]
    granularity: str = "by-type"
    prior: str = DEFAULT_PRIOR
    values: Values | None = None
    """What was measured of the layers, for the prior that goes by it and for bits."""
    spares: bool = False
    """Whether memory that ranks leave is spent on layers in 16 bits."""
    ranks: tuple[int, ...] = choices.RANKS

    def run(self) -> Found:
        """The best recipe; raises InputError where nothing fits."""
        num_looked_at = 0
        for length in self._lengths():
            for quantization in choices.quantizations(self.base, self.given):
                made = [*self._recipes(quantization, length)]
                num_looked_at += len(made)
                tried = made if self._loads(made) else []
                fitting = [one for one in map(self.candidate, tried) if one is not None]
                found = self._best(fitting, num_looked_at)
                if found is not None:
                    return found
        if len(self._refused) == num_looked_at:
            raise self._refused[-1]
        return self._last_resort(num_looked_at)

    def candidate(self, recipe: Recipe) -> Candidate | None:
        """The recipe at the largest rank that all can share; None if none fits."""
        fitting = self._last_that_fits(recipe, self._limit(recipe))
        return None if fitting is None else self._judged(*fitting)

    def _limit(self, recipe: Recipe) -> int:
        """What may be reserved by the estimate, as far as verifications have shown."""
        return self._limits.get(_kind(recipe), self._budget_bytes)

    def _judged(self, recipe: Recipe, footprint: Footprint | None = None) -> Candidate:
        """A recipe whose modules share a rank, with what it loses and how it runs."""
        return Candidate(
            recipe=recipe,
            footprint=footprint or self.estimate(recipe),
            lost_share=self._lost_share(recipe.rank),
            cost=step_cost(self.architecture, recipe, self._rated),
        )

    def _last_that_fits(
        self, recipe: Recipe, limit_bytes: int
    ) -> tuple[Recipe, Footprint] | None:
        """The recipe at the last rank of the menu that fits, by halving."""
        made = self._smallest_of(recipe)
        try:
            footprint = self.estimate(made)
        except InputError as error:
            # Another combination may run where this one cannot.
            self._refused.append(error)
            return None
        if excess_bytes(footprint, limit_bytes) > 0:
            return None
        best, low, high = (made, footprint), 0, len(self._menu)
        while high - low > 1:
            middle = (low + high) // 2
            made = self._shared(recipe, self._menu[middle])
            footprint = self.estimate(made)
            if excess_bytes(footprint, limit_bytes) <= 0:
                best, low = (made, footprint), middle
            else:
                high = middle
        return best

    def smallest(self) -> Recipe:
        """The combination within the floors that takes the least."""
        length = self._floor
        quantization = choices.quantizations(self.base, self.given)[-1]
        made = [*self._recipes(quantization, length)]
        return min(map(self._smallest_of, made), key=self._estimated)

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

    def _estimated(self, recipe: Recipe) -> float:
        """The estimated peak; infinite for a recipe that cannot run."""
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

    def _best(self, fitting: list[Candidate], num_looked_at: int) -> Found | None:
        """The first of the best few that its verification upholds.

        One that fails says how far the estimate is off for its checkpointing: all of
        that kind are judged anew within so much less, here and at other lengths. After
        a few, the smallest of those left has the last try.
        """
        for tries_left in reversed(range(MOST_FINALISTS)):
            if not fitting:
                return None
            one = self.ordered(fitting)[0] if tries_left else self._smallest(fitting)
            limit = self._limit(one.recipe)
            if tries_left:
                upheld = self._uphold(one, limit, self.screen)
            else:
                upheld = self._uphold(one, _reserved(one))
            if upheld.excess_bytes <= 0:
                return Found(
                    ranked=upheld.ranked,
                    candidate=upheld.candidate,
                    considered=tuple(self.ordered(fitting)),
                    num_rejected=num_looked_at - len(fitting),
                )
            off = math.ceil(CAUTION * upheld.excess_bytes)
            kind = _kind(one.recipe)
            self._limits[kind] = min(upheld.estimated_bytes - off, limit - 1)
            fitting = [*self._judged_anew(fitting, kind)]
        return None

    def _judged_anew(
        self, fitting: Iterable[Candidate], kind: Kind
    ) -> Iterator[Candidate]:
        """Those that still fit when all of a kind are judged again."""
        for one in fitting:
            concerned = _kind(one.recipe) == kind
            again = self.candidate(one.recipe) if concerned else one
            if again is not None:
                yield again

    def _uphold(
        self, one: Candidate, limit_bytes: int, screen: Estimate | None = None
    ) -> Upheld:
        """The candidate with its ranks within a limit, and what verifying it says.

        One that does not pass the screen is not verified.
        """
        ranked = self._ranked(one.recipe, limit_bytes) if self._linears else None
        recipe = one.recipe if ranked is None else ranked.recipe
        estimated = one.footprint if ranked is None else ranked.footprint
        if self.spares:
            recipe = self._with_spared(recipe, limit_bytes)
            estimated = self.estimate(recipe)
        found = None if screen is None else screen(recipe)
        if found is None or excess_bytes(found, self._budget_bytes) <= 0:
            found = self.verify(recipe)
        return Upheld(
            ranked=ranked,
            candidate=dataclasses.replace(one, recipe=recipe, footprint=found),
            estimated_bytes=estimated.life_peak.reserved_bytes,
            excess_bytes=excess_bytes(found, self._budget_bytes),
        )

    def _smallest(self, fitting: Iterable[Candidate]) -> Candidate:
        """The smallest of the candidates, at the smallest ranks."""
        made = (self._smallest_of(one.recipe) for one in fitting)
        return self._judged(min(made, key=self._estimated))

    def _last_resort(self, num_looked_at: int) -> Found:
        """The smallest recipe of all, of which an estimate alone may think too much.

        Raises InputError with what is missing.
        """
        one = self._judged(self.smallest())
        excess = excess_bytes(one.footprint, self._budget_bytes)
        if excess <= DOUBTED_SHARE * self._budget_bytes:
            upheld = self._uphold(one, _reserved(one))
            excess = upheld.excess_bytes
            if excess <= 0:
                return Found(
                    ranked=upheld.ranked,
                    candidate=upheld.candidate,
                    considered=(one,),
                    num_rejected=num_looked_at - 1,
                )
        raise InputError(
            "--gpu",
            self.gpu.name,
            "is too small: the smallest recipe within the floors lacks "
            f"{format_bytes(excess)}",
            "see `memplan why-not`",
        )

    def _ranked(self, recipe: Recipe, budget_bytes: int) -> Ranked | None:
        return RankSearch(
            recipe=recipe,
            groups=self._groups,
            estimate=self.estimate,
            budget_bytes=budget_bytes,
            ranks=self._menu,
            prior=self.prior,
            values=self.values,
        ).run()

    def _with_spared(self, recipe: Recipe, limit_bytes: int) -> Recipe:
        """The recipe with the layers in 16 bits for which a limit leaves room."""
        values = self.values
        if values is None or recipe.quantization != values.quantization:
            return recipe
        return BitSearch(
            recipe=recipe,
            groups=self._groups,
            estimate=self.estimate,
            budget_bytes=limit_bytes,
            errors=values.errors,
        ).run()

    def _recipes(self, quantization: str, length: int) -> Iterator[Recipe]:
        return choices.recipes(self.base, self.given, self.floors, quantization, length)

    def _shared(self, recipe: Recipe, rank: int) -> Recipe:
        return with_ranks(recipe, dict.fromkeys(self._linears, rank))

    def _lengths(self) -> Iterator[int]:
        """The sequence lengths to try, from the longest that the estimate has."""
        length = self._floor
        if self.prefer == "length" and "sequence_length" not in self.given:
            length = self._longest()
        while length > self._floor:
            yield length
            length = choices.shorter(length)
        yield self._floor

    def _longest(self) -> int:
        """The longest sequence that any combination fits, by the estimate."""
        steps = 0
        for quantization in choices.quantizations(self.base, self.given):
            # The smallest combinations come last; one that beats none is asked once.
            for recipe in reversed([*self._recipes(quantization, self._floor)]):
                steps = self._more_steps(recipe, steps)
        return max(steps * LENGTH_STEP, self._floor)

    def _more_steps(self, recipe: Recipe, steps: int) -> int:
        """The most steps of length that the recipe fits, at least those given."""
        low, high = steps, choices.longest_length(self.architecture) // LENGTH_STEP + 1
        middle = steps + 1
        while high - low > 1:
            if self._fits_at(recipe, middle * LENGTH_STEP):
                low = middle
            elif low == steps:
                return steps
            else:
                high = middle
            middle = (low + high) // 2
        return low

    def _fits_at(self, recipe: Recipe, length: int) -> bool:
        made = dataclasses.replace(recipe, sequence_length=length)
        needed = self._estimated(self._smallest_of(made))
        return needed <= self._limit(recipe)

    @property
    def _floor(self) -> int:
        """The length that a plan has at least."""
        given = "sequence_length" in self.given
        return self.base.sequence_length if given else self.floors.sequence_length

    @functools.cached_property
    def _limits(self) -> dict[Kind, int]:
        """What may be reserved by the estimate, for kinds of which it was off."""
        return {}

    @functools.cached_property
    def _budget_bytes(self) -> int:
        return self.gpu.budget_bytes - self.floors.margin_bytes

    @functools.cached_property
    def _linears(self) -> dict[str, Linear]:
        """The layers whose ranks are searched; none where these are settled."""
        takes_ranks = "rank_pattern" in methods.find(self.base.method).reads(self.base)
        if "rank_pattern" in self.given or not takes_ranks:
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

    def _lost_share(self, rank: int) -> float:
        """What is lost at a rank that all modules share."""
        if rank not in self._lost_shares:
            ranks = dict.fromkeys(self._linears, rank)
            lost = lost_share(self._linears, ranks) if ranks else 0.0
            self._lost_shares[rank] = lost
        return self._lost_shares[rank]

    @functools.cached_property
    def _lost_shares(self) -> dict[int, float]:
        """By rank, as far as was asked."""
        return {}


def _kind(recipe: Recipe) -> Kind:
    return tuple(getattr(recipe, key) for key in SHAPING_KEYS)


def _reserved(one: Candidate) -> int:
    return one.footprint.life_peak.reserved_bytes


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
