"""The longest sequence that fits on a card, batch by batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from memplan import estimator, tapes
from memplan.errors import InputError
from memplan.estimator import Estimate
from memplan.estimator.limits import longest_sequence
from memplan.gpu import Gpu

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Sequences in a micro-batch that are looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """The longest sequence at a batch; None where none fits."""

    batch_size: int
    sequence_length: int | None
    ends: bool = False
    """Whether it is the model's positions that end there, not the memory."""


def frontier(estimate: Estimate, gpu: Gpu | None) -> tuple[Reach, ...]:
    """The longest sequence at each of BATCHES, to the first where none fits."""
    if gpu is None:
        return ()
    found: list[Reach] = []
    for batch_size in BATCHES:
        one = _reach(estimate, gpu, batch_size)
        if one is not None:
            found.append(one)
        if one is None or one.sequence_length is None:
            break
    return tuple(found)


def _reach(estimate: Estimate, gpu: Gpu, batch_size: int) -> Reach | None:
    """The reach at a batch; None where a trace would be needed."""
    architecture = estimate.parts.architecture
    recipe = dataclasses.replace(estimate.parts.recipe, batch_size=batch_size)
    try:
        with tapes.known_only():
            other = estimator.run(architecture, recipe, gpu)
            length = longest_sequence(other, gpu)
    except InputError:
        return None
    ends = length is not None and length == architecture.max_positions
    return Reach(batch_size=batch_size, sequence_length=length, ends=ends)
