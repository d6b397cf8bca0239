"""`estimate`: a fine-tune's memory in closed form, without torch.

The listing is the equation: `weights`, `adapters`, `gradients`, `optimizer`,
`activations`, `logits`; `schedule` says which of them are alive together, and `moments`
what is the most at each moment. What the allocator reserves for it is replayed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memplan import checks
from memplan.architecture import Architecture
from memplan.estimator.experts import check_experts
from memplan.estimator.moments import moments
from memplan.estimator.reserved import (
    MISSING_PRECISION,
    NotReplayedError,
    Reserved,
    fit_into,
)
from memplan.estimator.schedule import Parts, Step, parts_of, step_of
from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu, find_gpu
from memplan.recipe import Recipe

WITHOUT_CACHE = (
    "Reserved bytes are the most that is allocated; `memplan simulate` has what the "
    "allocator's cache holds beyond it, and may say that a recipe with little to spare "
    "does not fit."
)

UNNAMED_CARD = "80GB"
"""What stands for the card where none is named; its kernels are those of 8.6."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """An estimated fine-tune: its footprint and the parts that it comes from."""

    footprint: Footprint
    parts: Parts
    step: Step

    @property
    def parameters(self) -> dict[str, int]:
        return {
            "total": self.parts.architecture.total_parameters,
            "trainable": self.parts.trained.num_parameters,
        }


def estimate(
    architecture: Architecture, recipe: Recipe, gpu: Gpu | None = None
) -> Footprint:
    """Bytes through load, adaptation and steps of a fine-tune, without running it.

    Allocated bytes are the closed form's; reserved bytes come of its blocks, replayed
    through the allocator's rules. Without a card, kernels are those of compute
    capability 8.6. Raises InputError for a recipe that cannot run, MissingExtraError
    where a tape has to be traced first.

    >>> import memplan
    >>> model = memplan.inspect("meta-llama/Llama-2-7b-hf")
    >>> recipe = memplan.Recipe(quantization="nf4-double")
    >>> footprint = memplan.estimate(model, recipe)
    >>> [moment.label for moment in footprint.moments][:3]
    ['load', 'adapt', '1.forward']
    >>> footprint.breakdown["quantization_state"]
    103251968
    """
    return replayed(run(architecture, recipe, gpu), gpu).footprint


def run(architecture: Architecture, recipe: Recipe, gpu: Gpu | None = None) -> Estimate:
    """The closed form with its parts; errors likewise.

    Its reserved bytes are the most that was allocated so far, the least they can be.
    """
    notes = checks.check(architecture, recipe, gpu)
    check_experts(architecture, recipe)
    parts = parts_of(architecture, recipe, gpu or _unnamed())
    step = step_of(parts, recipe.batch_size, recipe.sequence_length)
    footprint = Footprint(
        moments=moments(parts, step),
        context_bytes=gpu.context_bytes if gpu else None,
        paged_bytes=parts.paged,
        capacity_bytes=gpu.capacity_bytes - gpu.reserve_bytes if gpu else None,
        notes=notes,
    )
    return Estimate(footprint=footprint, parts=parts, step=step)


def replayed(
    estimate: Estimate, gpu: Gpu | None, *, missing_precision: int = MISSING_PRECISION
) -> Estimate:
    """The estimate with what the allocator reserves on the card.

    Where the card does not suffice, reserved bytes are those of one that does, and what
    is missing is found to one part in `missing_precision`. They stay the closed form's
    where there is no track to replay, which a note says.
    """
    footprint, parts = estimate.footprint, estimate.parts
    budget_bytes = gpu.budget_bytes if gpu else None
    try:
        found, missing_bytes = fit_into(parts, budget_bytes, missing_precision)
    except NotReplayedError as error:
        notes = (*footprint.notes, f"{error} {WITHOUT_CACHE}")
        return _with(estimate, dataclasses.replace(footprint, notes=notes))
    return _with(
        estimate,
        dataclasses.replace(
            footprint,
            moments=tuple(_with_reserved(footprint.moments, found)),
            failed_moment=found.failed_moment,
            missing_bytes=missing_bytes,
        ),
    )


def _with(estimate: Estimate, footprint: Footprint) -> Estimate:
    return dataclasses.replace(estimate, footprint=footprint)


def _with_reserved(moments: Iterable[Moment], found: Reserved) -> Iterator[Moment]:
    """Moments with replayed bytes, which are at least what is allocated."""
    least = 0
    for moment in moments:
        least = max(least, moment.allocated_bytes, found.by_moment[moment.label])
        yield dataclasses.replace(moment, reserved_bytes=least)


@functools.cache
def _unnamed() -> Gpu:
    return find_gpu(UNNAMED_CARD)
