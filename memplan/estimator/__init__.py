"""`estimate`: a fine-tune's memory in closed form, without torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from memplan import checks
from memplan.architecture import Architecture

from memplan.estimator.schedule import (
    Candidate,
    Parts,
    Step,
    most,
    parts_of,
    step_of,
    workspaces,
)
from memplan.footprint import CATEGORIES, Footprint, Moment
from memplan.gpu import Gpu, find_gpu
from memplan.recipe import Recipe

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
    """
    return run(architecture, recipe, gpu).footprint


def run(architecture: Architecture, recipe: Recipe, gpu: Gpu | None = None) -> Estimate:
    """The estimate with its parts; errors likewise."""
    notes = checks.check(architecture, recipe, gpu)
    parts = parts_of(architecture, recipe, gpu or _unnamed())
    step = step_of(parts, recipe.batch_size, recipe.sequence_length)
    moments = tuple(_moments(parts, step))
    footprint = Footprint(
        moments=moments,
        context_bytes=gpu.context_bytes if gpu else None,
        paged_bytes=parts.paged,
        capacity_bytes=gpu.capacity_bytes - gpu.reserve_bytes if gpu else None,
        notes=notes,
    )
    return Estimate(footprint=footprint, parts=parts, step=step)


@functools.cache
def _unnamed() -> Gpu:
    return find_gpu(UNNAMED_CARD)


def _moments(parts: Parts, step: Step) -> list[Moment]:
    weights = parts.weights
    at_rest = weights.total + parts.adapters
    load = Candidate(activations=weights.load_peak - weights.total)
    adapt = Candidate(activations=max(weights.prepare_peak - at_rest, 0))
    moments = [
        _moment(parts, "load", (load,), adapters=0, state=0, workspace=0),
        _moment(parts, "adapt", (adapt,), state=0, workspace=0),
    ]
    one, both = workspaces(parts)
    clips = parts.recipe.max_grad_norm is not None
    gradients = parts.gradients
    for number in (1, 2):
        state = parts.state if number > 1 else 0
        forward = step.forward
        if number > 1 and parts.recipe.keep_outputs == "step":
            forward = tuple(_with_output(point, step) for point in forward)
        space = both if number > 1 or parts.recipe.accumulation > 1 else one
        moments.append(
            _moment(parts, f"{number}.forward", forward, state=state, workspace=space)
        )
        moments.append(
            _moment(
                parts, f"{number}.backward", step.backward, state=state, workspace=both
            )
        )
        if clips:
            point = Candidate(activations=step.left + parts.clip, gradients=gradients)
            moments.append(
                _moment(parts, f"{number}.clip", (point,), state=state, workspace=both)
            )
        point = Candidate(activations=step.left + parts.step, gradients=gradients)
        moments.append(
            _moment(
                parts,
                f"{number}.optimizer",
                (point,),
                state=parts.state,
                workspace=both,
            )
        )
    return moments


def _with_output(point: Candidate, step: Step) -> Candidate:
    return Candidate(
        activations=point.activations,
        logits=point.logits + step.left,
        gradients=point.gradients,
    )


def _moment(
    parts: Parts,
    label: str,
    points: tuple[Candidate, ...],
    *,
    state: int,
    workspace: int,
    adapters: int | None = None,
) -> Moment:
    point = max(points, key=lambda candidate: candidate.total)
    breakdown = {
        "weights": parts.weights.weights,
        "quantization_state": parts.weights.state,
        "adapters": parts.adapters if adapters is None else adapters,
        "gradients": point.gradients,
        "optimizer": state,
        "activations": point.activations,
        "logits": point.logits,
        "workspace": workspace,
    }
    whole = {name: round(breakdown.get(name, 0)) for name in CATEGORIES}
    allocated = sum(whole.values())
    return Moment(
        label=label,
        allocated_bytes=allocated,
        reserved_bytes=allocated,
        breakdown=whole,
    )
