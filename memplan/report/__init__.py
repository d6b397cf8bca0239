"""`Report`: everything that is shown of one fine-tune, whatever it is known from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memplan import estimator, tapes
from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.estimator import Estimate
from memplan.estimator.equations import WORDS, Share, Term, terms
from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu
from memplan.inference import Inference
from memplan.plan import Plan
from memplan.profile import Profile
from memplan.recipe import Recipe
from memplan.report.course import Course, Point, of_moments
from memplan.report.exports import Export, exports
from memplan.report.frontier import Reach, frontier
from memplan.report.levers import Levers, levers
from memplan.report.modules import Cell, cells
from memplan.residuals import Range, comparable_errors
from memplan.simulation import LiveBlock, Simulation

if TYPE_CHECKING:
    from memplan.estimator.inference import InferenceEstimate

LARGEST = 12
"""Tensors that are listed."""

_WAYS = {"estimate": "estimate"}
"""By kind of report: whose errors stand beside it, _BEST's where none is."""

_BEST = "simulate"

SOURCES = {
    "estimate": "estimated in closed form",
    "simulation": "simulated, byte for byte",
    "plan": "planned",
    "measurement": "measured",
}
"""How the bytes of each kind of report are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What is shown of one fine-tune, or inference; what is not known is empty."""

    kind: str
    """One of SOURCES."""
    drawn_from: str
    """What the course and the terms are from: `estimate` or `simulation`."""
    architecture: Architecture
    recipe: Recipe
    gpu: Gpu | None
    footprint: Footprint
    parameters: Mapping[str, int]
    terms: tuple[Term, ...]
    """The peak by category, and where each comes from."""
    course: Course
    """Memory through load and steps, by category."""
    levers: Levers
    reach: tuple[Reach, ...]
    """The longest sequence that fits, batch by batch."""
    cells: tuple[Cell, ...]
    """Rank and bits of each linear layer."""
    largest: tuple[LiveBlock, ...]
    """The largest tensors at the peak, of a simulation."""
    exports: tuple[Export, ...]
    errors: Mapping[str, Range]
    """How far such predictions were from comparable measured runs, by reading."""
    inference: Inference | None = None
    """What is answered, where nothing is trained."""
    plan: Plan | None = None
    measured: Profile | None = None
    predicted: Footprint | None = None
    """What is set beside the measured run."""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The numbers that the report shows, for whoever reads it by a program."""
        asked = (
            {} if self.inference is None else {"inference": self.inference.to_json()}
        )
        return {
            "kind": self.kind,
            "model": self.architecture.name,
            "recipe": self.recipe.to_json(),
            **asked,
            "gpu": None if self.gpu is None else self.gpu.to_json(),
            **self.footprint.to_json(),
            "parameters": dict(self.parameters),
            "terms": [term.to_json() for term in self.terms],
            "levers": [one.to_json() for one in self.levers.changes],
            "frontier": [dataclasses.asdict(one) for one in self.reach],
            "largest": [dataclasses.asdict(one) for one in self.largest],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What a report is about."""

    architecture: Architecture
    recipe: Recipe
    gpu: Gpu | None
    versions: Mapping[str, str]
    inference: Inference | None = None
    """Asked for in the place of a fine-tune."""


def of_estimate(
    subject: Subject, found: Estimate | None = None, *, whole: bool = True
) -> Report:
    """The report of an estimate, made here unless it is given.

    It needs no torch where the estimate needs none. Unless `whole`, nothing is asked of
    other recipes, nor written for trainers.

    Raises InputError for a recipe that cannot run.
    """
    if subject.inference is not None:
        return _of_answers(subject, subject.inference)
    found = found or _run(subject)
    return _of_closed_form(subject, found, terms(found), estimate=found, whole=whole)


def _of_answers(subject: Subject, asked: Inference) -> Report:
    from memplan.estimator import inference

    found = inference.run(subject.architecture, subject.recipe, asked, subject.gpu)
    return _of_closed_form(subject, found, inference.inference_terms(found))


def _of_closed_form(
    subject: Subject,
    found: Estimate | InferenceEstimate,
    listed: tuple[Term, ...],
    *,
    estimate: Estimate | None = None,
    whole: bool = True,
) -> Report:
    return _report(
        subject,
        kind="estimate",
        drawn_from="estimate",
        footprint=found.footprint,
        parameters=found.parameters,
        terms=listed,
        course=of_moments(found.footprint.moments),
        estimate=estimate,
        whole=whole,
    )


def of_simulation(subject: Subject, found: Simulation, course: Course) -> Report:
    """The report of a simulation; its terms have no equations with numbers."""
    return _report(
        subject,
        kind="simulation",
        drawn_from="simulation",
        footprint=found.footprint,
        parameters=found.parameters,
        terms=_plain_terms(found.footprint),
        course=course,
        largest=tuple(found.largest(LARGEST)),
        estimate=_estimated(subject),
    )


def of_plan(plan: Plan, about: Report) -> Report:
    """A plan's report, drawn from an estimate or a simulation of its recipe.

    Verdict and peak are the plan's own.
    """
    return dataclasses.replace(
        about,
        kind="plan",
        plan=plan,
        footprint=_with_breakdowns(plan.footprint, about.footprint),
        terms=_plain_terms(plan.footprint),
        parameters=plan.parameters,
        notes=tuple(dict.fromkeys((*plan.notes, *about.notes))),
    )


def of_run(run: Profile, about: Report) -> Report:
    """A measured run's report beside what is predicted of it.

    Raises InputError for a run of which no moment was measured.
    """
    if run.footprint is None:
        remedy = "choose a run whose outcome is ok"
        raise InputError("run", run.id, "was stopped before any moment ended", remedy)
    measured = dataclasses.replace(
        run.footprint, capacity_bytes=about.footprint.capacity_bytes
    )
    return dataclasses.replace(
        about,
        kind="measurement",
        measured=run,
        footprint=measured,
        predicted=about.footprint,
        parameters=run.parameters or about.parameters,
        notes=tuple(dict.fromkeys((*run.notes, *about.notes))),
    )


def _report(
    subject: Subject,
    *,
    footprint: Footprint,
    estimate: Estimate | None,
    whole: bool = True,
    **parts: Any,
) -> Report:
    gpu, recipe, kind = subject.gpu, subject.recipe, parts["kind"]
    model, asked = subject.architecture, subject.inference
    whole = whole and asked is None
    errors = {} if asked else comparable_errors(recipe, gpu, _WAYS.get(kind, _BEST))
    return Report(
        architecture=model,
        recipe=recipe,
        gpu=gpu,
        footprint=footprint,
        levers=levers(model, recipe, gpu) if whole else Levers(),
        reach=frontier(estimate, gpu) if estimate and whole else (),
        cells=cells(estimate) if estimate and whole else (),
        exports=exports(model, recipe, gpu, footprint, kind) if whole else (),
        errors=errors,
        inference=asked and asked.settled(model, recipe),
        notes=(*(gpu.assumptions if gpu else ()), *footprint.notes),
        versions=subject.versions,
        **{"largest": (), **parts},
    )


def _run(subject: Subject) -> Estimate:
    found = estimator.run(subject.architecture, subject.recipe, subject.gpu)
    return estimator.replayed(found, subject.gpu)


def _estimated(subject: Subject) -> Estimate | None:
    """The estimate beside a simulation; None for what only a simulation knows."""
    if subject.inference is not None:
        return None
    try:
        with tapes.known_only():
            return _run(subject)
    except InputError:
        return None


def _plain_terms(footprint: Footprint) -> tuple[Term, ...]:
    return tuple(
        Term(name=name, num_bytes=size, words=WORDS[name], shares=())
        for name, size in footprint.breakdown.items()
        if size
    )


def _with_breakdowns(footprint: Footprint, other: Footprint) -> Footprint:
    """The footprint, its moments' parts taken from another where it has none."""
    known = {moment.label: moment.breakdown for moment in other.moments}

    def filled(moment: Moment) -> Moment:
        breakdown = moment.breakdown or known.get(moment.label, {})
        return dataclasses.replace(moment, breakdown=breakdown)

    return dataclasses.replace(footprint, moments=tuple(map(filled, footprint.moments)))


__all__ = [
    "Course",
    "Export",
    "Levers",
    "Point",
    "Reach",
    "Report",
    "Share",
    "Subject",
    "of_estimate",
    "of_plan",
    "of_run",
    "of_simulation",
]
