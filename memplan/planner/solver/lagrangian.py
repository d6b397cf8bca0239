"""The Lagrangian of the knapsack: a bound, prices, and a solution within milliseconds.

    L(price) = sum_i min_c (cost[i, c] + sum_p price[p] bytes[p, i, c])
               - sum_p price[p] free[p],   price >= 0

is below the cost of everything that fits, whatever the prices (Geoffrion, 1974). Along
a direction of prices it is concave and piecewise linear, so its maximum there is where
the lines of two choices cross. The direction then turns towards the moments that are
exceeded.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from memplan.planner.solver.problem import (
    Floats,
    Integers,
    Problem,
    Solution,
    Status,
    relative_gap,
)

MOST_TURNS = 40
"""Directions that are tried where several moments bind."""

MOST_CROSSINGS = 64
"""Lines that are crossed along one direction; a dozen suffice as a rule."""

MOST_REPAIRS = 64
"""Modules apart from what fits, up to which choices that exceed are repaired, too."""

MOST_FILLS = 256
"""Changes that fill what is left of a budget."""

SHARE_OF_THE_REST = 0.1
"""What a moment that a direction leaves out pays beside the dearest."""

LEAST_PRICE, MOST_PRICE = 1e-9, 1e12
"""Prices between which one is looked for that makes everything fit."""

HALVINGS = 24
"""Halvings of that range of prices."""

PATIENCE = 4
"""Turns within which the bound has to rise for the search to go on."""

SMALLEST_RISE = 1e-4
"""The share of the bound that it has to rise by."""


def solve_lagrangian(problem: Problem) -> Solution:
    """Choices that fit, with the bound and the prices of the best Lagrangian found."""
    start = time.perf_counter()
    search = _Search(problem)
    if not (problem.smallest_bytes() <= problem.free_bytes).all():
        status = Status.INFEASIBLE
    else:
        search.run()
        status = search.status
    return Solution(
        solver="lagrangian",
        status=status,
        choices=None if search.best is None else tuple(map(int, search.best)),
        objective=search.objective,
        dual_bound=math.inf if status is Status.INFEASIBLE else search.bound,
        prices=tuple(map(float, search.prices)),
        used_bytes=()
        if search.best is None
        else tuple(map(int, problem.bytes_of(search.best))),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """What minimises the Lagrangian at some prices."""

    choices: Integers
    cost: float
    excess: Floats
    """(moments,): bytes used less bytes free, as shares of the scale."""


_Crossing = tuple[_Point, _Point, float, Floats]
"""Two points whose lines cross at a price along a direction; the first exceeds."""


def _has_settled(bound: float, earlier: float) -> bool:
    return bound - earlier <= SMALLEST_RISE * abs(bound)


@dataclass(slots=True, eq=False)
class _Search:
    """The best bound and the best choices found so far."""

    problem: Problem
    best: Integers | None = None
    objective: float = math.inf
    bound: float = -math.inf
    _scaled_prices: Floats = field(init=False)
    _scale: Floats = field(init=False)
    _weights: Floats = field(init=False)
    _free: Floats = field(init=False)

    def __post_init__(self) -> None:
        num_bytes = np.where(self.problem.exists, self.problem.num_bytes, 0)
        widest = num_bytes.max(axis=2).sum(axis=1) - num_bytes.min(axis=2).sum(axis=1)
        self._scale = np.maximum(widest, 1).astype(np.float64)
        self._weights = num_bytes / self._scale[:, None, None]
        self._free = self.problem.free_bytes / self._scale
        self._scaled_prices = np.zeros(len(self._free))

    @property
    def prices(self) -> Floats:
        """(moments,): cost a byte."""
        return self._scaled_prices / self._scale

    @property
    def status(self) -> Status:
        if self.best is None:
            return Status.UNSOLVED
        proven = relative_gap(self.objective, self.bound) == 0.0
        return Status.OPTIMAL if proven else Status.HEURISTIC

    def run(self) -> None:
        """Searches the prices, then fills what is left of the budget."""
        nothing = np.zeros_like(self._free)
        free = self._at(nothing)
        self._note_bound(free, nothing)
        if self.problem.fits(free.choices):
            self._keep(free.choices)
            return
        self._round(*self._best_crossing(self._first_direction(free)))

    def _best_crossing(self, direction: Floats) -> _Crossing:
        """Turns the direction while that raises the bound; the best that was seen."""
        best = None
        bounds = [self.bound]
        for turn in range(MOST_TURNS):
            below, above, price = self._along(direction)
            bounds.append(self.bound)
            if best is None or bounds[-1] > bounds[-2]:
                best = (below, above, price, direction)
            if turn >= PATIENCE and _has_settled(bounds[-1], bounds[-1 - PATIENCE]):
                break
            turned = self._turned(direction, below, above, turn)
            if np.allclose(turned, direction, rtol=1e-6, atol=0):
                break
            direction = turned
        assert best is not None
        return best

    def _round(
        self, below: _Point, above: _Point, price: float, direction: Floats
    ) -> None:
        """Makes choices that fit of the two points whose lines cross."""
        if not self.problem.fits(above.choices):
            below, above = self._raised(above, price, direction)
        self._keep(self._mixed(below.choices, above.choices))
        if (below.choices != above.choices).sum() <= MOST_REPAIRS:
            self._keep(self._repaired(below.choices))

    def _raised(
        self, point: _Point, price: float, direction: Floats
    ) -> tuple[_Point, _Point]:
        """The points at prices just too low and just high enough for every moment.

        Moments that the direction leaves out pay a share, so that they come to fit.
        """
        spread = np.maximum(direction, SHARE_OF_THE_REST * direction.max())
        below, low, high = point, price, max(price, LEAST_PRICE)
        above = self._at(high * spread)
        while not self.problem.fits(above.choices) and high < MOST_PRICE:
            below, low, high = above, high, high * 4
            above = self._at(high * spread)
        for _ in range(HALVINGS):
            middle = self._at((low + high) / 2 * spread)
            if self.problem.fits(middle.choices):
                above, high = middle, (low + high) / 2
            else:
                below, low = middle, (low + high) / 2
        return below, above

    def _at(self, prices: Floats) -> _Point:
        choices = (self.problem.costs + self._priced(prices)).argmin(axis=1)
        used = self._weights[:, np.arange(len(choices)), choices].sum(axis=1)
        return _Point(choices, self.problem.cost_of(choices), used - self._free)

    def _priced(self, prices: Floats) -> Floats:
        """(modules, choices): what the bytes of every choice cost.

        Summed by hand, since most moments are free and BLAS waits for its threads.
        """
        total = np.zeros(self.problem.costs.shape)
        for moment in np.flatnonzero(prices):
            total += prices[moment] * self._weights[moment]
        return total

    def _note_bound(self, point: _Point, prices: Floats) -> None:
        value = point.cost + float(prices @ point.excess)
        if value > self.bound:
            self.bound, self._scaled_prices = value, prices

    def _first_direction(self, free: _Point) -> Floats:
        """The moment that is exceeded the most, for which the whole price is paid."""
        direction = np.zeros_like(self._free)
        direction[int(free.excess.argmax())] = 1.0
        return direction

    def _along(self, direction: Floats) -> tuple[_Point, _Point, float]:
        """The points whose lines cross at the maximum along a direction, and where.

        The first exceeds the direction's moments, the second does not. Prices beyond
        the largest cost by byte choose the fewest bytes there are.
        """
        price = 0.0
        below = self._at(np.zeros_like(direction))
        above = self._cheapest_in(direction)
        for _ in range(MOST_CROSSINGS):
            rise = float(direction @ (below.excess - above.excess))
            if rise <= 0:
                break
            price = max(0.0, (above.cost - below.cost) / rise)
            point = self._at(price * direction)
            self._note_bound(point, price * direction)
            slope = float(direction @ point.excess)
            crossing = below.cost + price * float(direction @ below.excess)
            value = point.cost + price * slope
            if value >= crossing - 1e-12 * max(1.0, abs(crossing)):
                break
            if slope > 0:
                below = point
            else:
                above = point
        return below, above, price

    def _cheapest_in(self, direction: Floats) -> _Point:
        """The point of the fewest bytes in a direction, the cheapest among these."""
        weights = np.where(self.problem.exists, self._priced(direction), np.inf)
        fewest = weights <= weights.min(axis=1, keepdims=True)
        choices = np.where(fewest, self.problem.costs, np.inf).argmin(axis=1)
        used = self._weights[:, np.arange(len(choices)), choices].sum(axis=1)
        return _Point(choices, self.problem.cost_of(choices), used - self._free)

    def _turned(
        self, direction: Floats, below: _Point, above: _Point, turn: int
    ) -> Floats:
        """The direction, turned by a subgradient that is level along it."""
        falls, rises = direction @ above.excess, direction @ below.excess
        share = -falls / (rises - falls) if rises > falls else 0.0
        level = share * below.excess + (1 - share) * above.excess
        size = float(np.abs(level).max())
        if size == 0:
            return direction
        step = direction.max() / (size * (1 + turn) ** 0.75)
        moved: Floats = np.maximum(direction + step * level, 0.0)
        return moved / moved.max() if moved.max() > 0 else direction

    def _mixed(self, below: Integers, above: Integers) -> Integers:
        """The choices that fit with as many of those that exceed as still fit.

        At the prices where their lines cross, any mixture costs the same with its
        bytes paid for.
        """
        differing = np.flatnonzero(below != above)
        mixed = above.copy()
        if not len(differing) or not self.problem.fits(above):
            return mixed
        held = self.problem.num_bytes
        more = (
            held[:, differing, below[differing]] - held[:, differing, above[differing]]
        )
        left = self.problem.free_bytes - self.problem.bytes_of(above)
        exceeds = (more.cumsum(axis=1) > left[:, None]).any(axis=0)
        count = int(exceeds.argmax()) if exceeds.any() else len(differing)
        mixed[differing[:count]] = below[differing[:count]]
        return mixed

    def _keep(self, choices: Integers | None) -> None:
        if choices is None:
            return
        filled = self._filled(choices)
        cost = self.problem.cost_of(filled)
        if cost < self.objective:
            self.best, self.objective = filled, cost

    def _changes(self, choices: Integers) -> tuple[Floats, Integers]:
        """What every single change does to the cost, and to each moment's bytes."""
        rows = np.arange(len(choices))
        costs, held = self.problem.costs, self.problem.num_bytes
        return (
            costs - costs[rows, choices][:, None],
            held - held[:, rows, choices][:, :, None],
        )

    def _repaired(self, choices: Integers) -> Integers | None:
        """The choices with as many changed, the best value first, as it takes to fit.

        None where no single change brings them nearer, or too many would be needed.
        """
        choices = choices.copy()
        scale = self._scale[:, None, None]
        for _ in range(MOST_REPAIRS):
            excess = self.problem.bytes_of(choices) - self.problem.free_bytes
            if (excess <= 0).all():
                return choices
            cost_changes, changes = self._changes(choices)
            over = np.maximum(excess[:, None, None] + changes, 0) / scale
            now = (np.maximum(excess, 0) / self._scale).sum()
            gain = np.where(self.problem.exists, now - over.sum(axis=0), 0.0)
            if gain.max() <= 0:
                return None
            with np.errstate(divide="ignore", invalid="ignore"):
                rate = np.where(gain > 0, np.maximum(cost_changes, 0) / gain, np.inf)
            module, choice = np.unravel_index(int(rate.argmin()), rate.shape)
            choices[module] = choice
        return None

    def _filled(self, choices: Integers) -> Integers:
        """The choices with what still fits, the largest saving first."""
        choices = choices.copy()
        left = self.problem.free_bytes - self.problem.bytes_of(choices)
        cost_changes, changes = self._changes(choices)
        for _ in range(MOST_FILLS):
            fitting = (changes <= left[:, None, None]).all(axis=0)
            savings = np.where(fitting, cost_changes, 0.0)
            module, choice = np.unravel_index(int(savings.argmin()), savings.shape)
            if savings[module, choice] >= 0:
                break
            left = left - changes[:, module, choice]
            changes[:, module] -= changes[:, module, choice][:, None].copy()
            cost_changes[module] -= cost_changes[module, choice]
            choices[module] = choice
        return choices
