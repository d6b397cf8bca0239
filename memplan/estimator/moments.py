"""The moments of a fine-tune, as the simulation has them, and their worst."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memplan.estimator.polynomials import larger
from memplan.estimator.schedule import Candidate, Parts, Step, most, workspaces
from memplan.footprint import CATEGORIES, Moment

STEPS = (1, 2)
"""The first step makes the optimizer's state; every later one is like the second."""


def moments(parts: Parts, step: Step) -> tuple[Moment, ...]:
    """Load, adaptation, and each phase of two steps.

    Reserved bytes never fall: the allocator keeps what it has reserved. What it holds
    beyond the largest peak so far, since cached blocks do not suit every request, is
    not estimated.
    """
    found: list[Moment] = []
    reserved = parts.weights.reserved
    for moment in _moments(parts, step):
        reserved = max(reserved, moment.allocated_bytes)
        found.append(
            Moment(
                label=moment.label,
                allocated_bytes=moment.allocated_bytes,
                reserved_bytes=reserved,
                breakdown=moment.breakdown,
            )
        )
    return tuple(found)


def life_peak_bytes(parts: Parts, step: Step) -> Any:
    """The most that is reserved in a life's moments, element by element."""
    weights = parts.weights
    before = max(weights.reserved, weights.load_peak, weights.prepare_peak)
    return larger(before, peak_bytes(parts, step))


def peak_bytes(parts: Parts, step: Step) -> Any:
    """The most that is allocated in any training step, element by element."""
    at_rest = parts.weights.total + parts.adapters
    _, workspace = workspaces(parts)
    peak: Any = 0
    for _, points, state in _phases(parts, step):
        peak = larger(peak, at_rest + state + workspace + most(points))
    return peak


def _phases(
    parts: Parts, step: Step
) -> Iterator[tuple[str, tuple[Candidate, ...], int]]:
    """Each phase of the steps: its label, its points, and the optimizer's state."""
    for number in STEPS:
        state = parts.state if number > 1 else 0
        yield f"{number}.forward", _forward(parts, step, number), state
        yield f"{number}.backward", step.backward, state
        if parts.recipe.max_grad_norm is not None:
            yield f"{number}.clip", (_between(parts, step, parts.clip),), state
        yield (
            f"{number}.optimizer",
            (_between(parts, step, parts.step),),
            parts.state,
        )


def _forward(parts: Parts, step: Step, number: int) -> tuple[Candidate, ...]:
    """A forward's points; a loop may still hold the output of the step before."""
    if number == 1 or parts.recipe.keep_outputs != "step":
        return step.forward
    return tuple(
        Candidate(
            activations=point.activations,
            logits=point.logits + step.left,
            gradients=point.gradients,
        )
        for point in step.forward
    )


def _between(parts: Parts, step: Step, scratch: int) -> Candidate:
    """Between backward and the next forward: gradients, and what the caller holds."""
    return Candidate(activations=step.left + scratch, gradients=parts.gradients)


def _moments(parts: Parts, step: Step) -> Iterator[Moment]:
    weights = parts.weights
    at_rest = weights.total + parts.adapters
    one, both = workspaces(parts)
    load = Candidate(activations=weights.load_peak - weights.total)
    yield _moment(parts, "load", (load,), adapters=0)
    adapt = Candidate(activations=max(weights.prepare_peak - at_rest, 0))
    yield _moment(parts, "adapt", (adapt,))
    first = one if parts.recipe.accumulation == 1 else both
    for label, points, state in _phases(parts, step):
        workspace = first if label == "1.forward" else both
        yield _moment(parts, label, points, state=state, workspace=workspace)


def _moment(  # noqa: PLR0913 - each is a part of the breakdown
    parts: Parts,
    label: str,
    points: tuple[Candidate, ...],
    *,
    state: int = 0,
    workspace: int = 0,
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
