"""The largest batch and the longest sequence of a fine-tune that still fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from memplan.architecture import Architecture
from memplan.estimator import Estimate
from memplan.estimator.moments import life_peak_bytes
from memplan.estimator.schedule import Parts, Step, parts_of, step_of
from memplan.gpu import Gpu

LENGTH_STEP = 64
"""Tokens between the sequences that are tried."""

LONGEST_SEQUENCE = 2**20
"""Tokens of the longest sequence that is tried."""

LARGEST_BATCH = 2**16
"""Sequences of the largest batch that is tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What still fits on a card; None where not even the least does."""

    batch_size: int | None
    """At the recipe's sequence."""
    sequence_length: int | None
    """At the recipe's batch, in steps of LENGTH_STEP."""

    def to_json(self) -> dict[str, int | None]:
        """The limits as output shows them."""
        return {
            "largest_batch_size": self.batch_size,
            "longest_sequence_length": self.sequence_length,
        }


def limits(estimate: Estimate, gpu: Gpu) -> Limits:
    """The largest batch and the longest sequence of an estimated fine-tune."""
    return Limits(
        batch_size=largest_batch(estimate, gpu),
        sequence_length=longest_sequence(estimate, gpu),
    )


def largest_batch(estimate: Estimate, gpu: Gpu) -> int | None:
    """The most sequences of the recipe's length that fit in a micro-batch."""
    room = _Room(estimate, gpu)
    length = estimate.parts.recipe.sequence_length
    return last_fitting(
        lambda batch: room.margin_bytes(batch, length),
        range(1, LARGEST_BATCH + 1),
        start=estimate.parts.recipe.batch_size,
    )


def longest_sequence(estimate: Estimate, gpu: Gpu) -> int | None:
    """The longest sequence that fits at the recipe's batch.

    In steps of LENGTH_STEP, up to the positions that the model is configured for.
    """
    room = _Room(estimate, gpu)
    batch = estimate.parts.recipe.batch_size
    return last_fitting(
        lambda length: room.margin_bytes(batch, length),
        lengths_of(estimate.parts.architecture),
        start=estimate.parts.recipe.sequence_length,
    )


def _cache_bytes(estimate: Estimate, gpu: Gpu) -> int:
    """What the allocator needs beyond what is allocated, where that made it fail."""
    footprint = estimate.footprint
    if footprint.failed_moment is None:
        return 0
    allocated: int = round(life_peak_bytes(estimate.parts, estimate.step))
    return max(gpu.budget_bytes + footprint.missing_bytes - allocated, 0)


class _Room:
    """What a fine-tune at other batches and sequences would leave of a card.

    By what is allocated: the allocator gives its cache back before it fails. Its parts
    depend on neither batch nor sequence, but for whether sequences outgrow the windows
    of sliding attention.
    """

    def __init__(self, estimate: Estimate, gpu: Gpu) -> None:
        parts = estimate.parts
        self._parts = {self._is_windowed(parts, parts.recipe.sequence_length): parts}
        self._base = parts
        self._estimate = estimate
        self._room_bytes = gpu.budget_bytes - _cache_bytes(estimate, gpu)

    def margin_bytes(self, batch: int, length: int) -> int:
        """What is left at the life's peak; negative where it lacks."""
        parts = self._parts_at(length)
        step = self._step(parts, batch, length)
        peak_bytes: int = round(life_peak_bytes(parts, step))
        return self._room_bytes - peak_bytes

    def _step(self, parts: Parts, batch: int, length: int) -> Step:
        recipe = self._base.recipe
        if (batch, length) == (recipe.batch_size, recipe.sequence_length):
            return self._estimate.step
        return step_of(parts, batch, length)

    def _parts_at(self, length: int) -> Parts:
        windowed = self._is_windowed(self._base, length)
        if windowed not in self._parts:
            recipe = dataclasses.replace(self._base.recipe, sequence_length=length)
            made = parts_of(self._base.architecture, recipe, self._base.gpu)
            self._parts[windowed] = made
        return self._parts[windowed]

    @staticmethod
    def _is_windowed(parts: Parts, length: int) -> bool:
        return parts.tape.window is not None and length > parts.tape.window


def lengths_of(architecture: Architecture) -> range:
    """The sequences that are tried, up to the positions a model is configured for."""
    longest = min(architecture.max_positions or LONGEST_SEQUENCE, LONGEST_SEQUENCE)
    step = min(LENGTH_STEP, longest)
    return range(step, longest + 1, step)


def last_fitting(
    margin: Callable[[int], int], values: range, *, start: int
) -> int | None:
    """The last of rising values whose margin, which falls, is not negative.

    `start` is tried first, as it is or the nearest below. Guesses lie where the line
    between two margins crosses zero (false position, with the Illinois rule): memory is
    close to linear, so few are needed.
    """
    first = (min(max(start, values[0]), values[-1]) - values[0]) // values.step
    at_low = at_high = float(margin(values[first]))
    if at_low >= 0:
        low, high = first, len(values) - 1
        at_high = margin(values[high])
        if at_high >= 0:
            return values[high]
    else:
        low, high = 0, first
        at_low = margin(values[low])
        if at_low < 0:
            return None
    fitted = None
    while high - low > 1:
        guess = low + int((high - low) * at_low / (at_low - at_high))
        guess = min(max(guess, low + 1), high - 1)
        found = margin(values[guess])
        fits = found >= 0
        if fits:
            low, at_low = guess, found
            at_high = at_high / 2 if fitted is True else at_high
        else:
            high, at_high = guess, found
            at_low = at_low / 2 if fitted is False else at_low
        fitted = fits
    return values[low]
