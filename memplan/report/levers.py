"""What each change of one knob would save, as far as nothing has to be traced."""

from __future__ import annotations

from dataclasses import dataclass

from memplan import estimator, tapes
from memplan.architecture import Architecture
from memplan.errors import InputError, UntracedError
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.planner.why_not import Change, Question
from memplan.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Levers:
    """Changes of one knob, what saves the most first."""

    changes: tuple[Change, ...] = ()
    num_unknown: int = 0
    """Changes that would take a trace first, and are left out."""


def levers(architecture: Architecture, recipe: Recipe, gpu: Gpu | None) -> Levers:
    """The changes that are known; none without a card, whose speed they are judged by.

    Neither torch nor a trace is needed: what would take one is counted.
    """
    if gpu is None:
        return Levers()
    unknown: list[Recipe] = []

    def estimate(one: Recipe) -> Footprint:
        try:
            with tapes.known_only():
                return estimator.run(architecture, one, gpu).footprint
        except UntracedError:
            unknown.append(one)
            raise

    question = Question(
        architecture=architecture, recipe=recipe, gpu=gpu, estimate=estimate
    )
    try:
        changes = question.single_changes
    except InputError:
        return Levers()
    return Levers(changes=changes, num_unknown=len(unknown))
