"""`estimate`: a fine-tune's memory in closed form, without torch.

The listing is the equation: `weights`, `adapters`, `gradients`, `optimizer`,
`activations`, `logits`; `schedule` says which of them are alive together, and `moments`
what is the most at each moment.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from memplan import checks
from memplan.architecture import Architecture
from memplan.estimator.experts import check_experts
from memplan.estimator.moments import moments
from memplan.estimator.schedule import Parts, Step, parts_of, step_of
from memplan.footprint import Footprint
from memplan.gpu import Gpu, find_gpu
from memplan.recipe import Recipe

WITHOUT_CACHE = (
    "What the allocator's cache holds beyond the peak is not estimated; `memplan "
    "simulate` has it, and may say that a recipe with little to spare does not fit."
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
    """Bytes through load, adaptation and steps of a fine-tune, in closed form.

    Without a card, kernels are those of compute capability 8.6. Raises InputError for a
    recipe that cannot run, MissingExtraError where a tape has to be traced first.

    >>> import memplan
    >>> model = memplan.inspect("meta-llama/Llama-2-7b-hf")
    >>> recipe = memplan.Recipe(quantization="nf4-double")
    >>> footprint = memplan.estimate(model, recipe)
    >>> [moment.label for moment in footprint.moments][:3]
    ['load', 'adapt', '1.forward']
    >>> footprint.breakdown["quantization_state"]
    103251968
    """
    return run(architecture, recipe, gpu).footprint


def run(architecture: Architecture, recipe: Recipe, gpu: Gpu | None = None) -> Estimate:
    """The estimate with its parts; errors likewise."""
    notes = checks.check(architecture, recipe, gpu)
    check_experts(architecture, recipe)
    parts = parts_of(architecture, recipe, gpu or _unnamed())
    step = step_of(parts, recipe.batch_size, recipe.sequence_length)
    footprint = Footprint(
        moments=moments(parts, step),
        context_bytes=gpu.context_bytes if gpu else None,
        paged_bytes=parts.paged,
        capacity_bytes=gpu.capacity_bytes - gpu.reserve_bytes if gpu else None,
        notes=(*notes, WITHOUT_CACHE),
    )
    return Estimate(footprint=footprint, parts=parts, step=step)


@functools.cache
def _unnamed() -> Gpu:
    return find_gpu(UNNAMED_CARD)
