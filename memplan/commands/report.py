"""`memplan report`: a fine-tune's memory to look at, as HTML and Markdown."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from memplan import accuracy
from memplan.allocator import AllocatorSettings
from memplan.catalog import architecture_of
from memplan.commands.compare import sides_of
from memplan.commands.explain import find_run
from memplan.commands.fits import chosen_models
from memplan.commands.options import (
    RecipeCommand,
    gpu_options,
    inference_options,
    json_option,
    key_options,
    model_argument,
    runs_folder_option,
    take_gpu,
    take_inference,
    take_recipe_keys,
    trust_option,
    without_compiler,
)
from memplan.commands.simulate import import_simulator
from memplan.commands.validate import compare_all, runs_at
from memplan.errors import InputError, MissingExtraError, UnknownNameError
from memplan.fits import DEFAULTS, ranked, ways, what_fits
from memplan.gpu import Gpu
from memplan.inference import Inference
from memplan.model_source import ModelSource, read_config
from memplan.plan import Plan
from memplan.profile import KIND, Profile
from memplan.recipe import Recipe
from memplan.report import (
    Course,
    Report,
    Subject,
    of_estimate,
    of_plan,
    of_run,
    of_simulation,
)
from memplan.report.course import of_samples
from memplan.reporters import (
    files,
    fits_report,
    json,
    sides_report,
    terminal,
    validation_report,
)
from memplan.reporters import report as reporter
from memplan.reporters.document import Document
from memplan.simulation import Sample
from memplan.store import read_json

OUT = "reports"


@click.command(cls=RecipeCommand)
@click.argument("subjects", nargs=-1, metavar="[MODEL|PLAN|RUN]...")
@click.option(
    "--recipe",
    "recipe_files",
    multiple=True,
    metavar="FILE",
    help="A recipe file, or - for standard input; options given as well win. Several "
    "are set side by side.",
)
@key_options
@gpu_options
@inference_options
@runs_folder_option
@click.option(
    "--out", default=OUT, show_default=True, metavar="DIR", help="The folder to write."
)
@click.option("--name", help="The name of the files [of what is reported].")
@click.option(
    "--simulate/--no-simulate",
    "simulates",
    default=None,
    help="Draw from a simulation [of plans and runs, where torch is installed].",
)
@click.option("--fits", "of_fits", is_flag=True, help="Report what fits on a card.")
@click.option(
    "--validate", "of_validation", is_flag=True, help="Report predicted and measured."
)
@trust_option
@json_option
def command(  # noqa: PLR0913 - each is an option
    subjects: tuple[str, ...],
    recipe_files: tuple[str, ...],
    folder: str,
    out: str,
    name: str | None,
    simulates: bool | None,
    of_fits: bool,
    of_validation: bool,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Write a report to look at: HTML, and Markdown with figures.

    MODEL is a catalog name, a hub id, a folder or a config.json; PLAN a file of
    `memplan plan`; RUN a record, or its name. With --fits: models, or all. Several
    --recipe of one MODEL are set side by side. Exits with 1 where the card is too
    small.
    """
    # What is imported stays until the process ends: no garbage is in it.
    gc.freeze()
    # Of several, each is read as it is set beside the others.
    options["recipe_file"] = recipe_files[0] if len(recipe_files) == 1 else None
    keys, named = take_recipe_keys(options)
    gpu = take_gpu(options)
    inference = take_inference(options)
    given = _Given(keys, gpu, inference, Path(folder), simulates, trust_remote_code)
    if inference is not None and (of_fits or of_validation or len(recipe_files) > 1):
        problem = "cannot be asked of many at once"
        remedy = "leave it out, or give one MODEL and one recipe"
        raise InputError("--inference", True, problem, remedy)
    if len(recipe_files) > 1:
        _refuse_many(recipe_files, other=of_fits or of_validation)
        made = given.side_by_side(subjects, recipe_files, quiet=as_json)
    elif of_validation:
        made = _validation(subjects, quiet=as_json)
    elif of_fits:
        made = _fits(subjects, keys, gpu, trust_remote_code=trust_remote_code)
    else:
        one = _only(subjects, named)
        made = reporter.document(given.report_on(one, quiet=as_json))
    written = files.write(made, Path(out), name)
    if as_json:
        json.report_object("report", _told(made, written))
    else:
        terminal.say(made.verdict, style="bold")
        for path in written:
            terminal.say(f"Wrote {path}")
    return 1 if made.fits is False else 0


def _refuse_many(recipe_files: Sequence[str], *, other: bool) -> None:
    """Raises InputError for recipes that cannot be set side by side."""
    value = ", ".join(recipe_files)
    if other:
        remedy = "give one with --fits, and none with --validate"
        raise InputError("--recipe", value, "are several", remedy)
    if recipe_files.count("-") > 1:
        raise InputError("--recipe", "-", "is read twice", "give files instead")


class _Given:
    """What the options say about the one report that is asked for."""

    def __init__(  # noqa: PLR0913 - each is an option
        self,
        keys: dict[str, Any],
        gpu: Gpu | None,
        inference: Inference | None,
        folder: Path,
        simulates: bool | None,
        trust_remote_code: bool,
    ) -> None:
        self._keys = keys
        self._gpu = gpu
        self._inference = inference
        self._folder = folder
        self._simulates = simulates
        self._trusts = trust_remote_code

    def report_on(self, name: str, *, quiet: bool) -> Report:
        """The report on a model, a plan or a run, whichever the name is of."""
        found = self._subject(name)
        given = self._keys or self._gpu or self._inference
        if not isinstance(found, ModelSource) and given:
            remedy = "leave --gpu, --inference and the recipe's options out"
            problem = "has a recipe and a card of its own"
            raise InputError("PLAN or RUN", name, problem, remedy)
        with terminal.progress(f"Reporting on {name}", quiet=quiet), without_compiler():
            if isinstance(found, Plan):
                return self._of_plan(found)
            if isinstance(found, Profile):
                return self._of_run(found)
            subject = Subject(
                architecture=architecture_of(found, trust_remote_code=self._trusts),
                recipe=Recipe.from_mapping(self._keys),
                gpu=self._gpu,
                versions=json.versions(),
                inference=self._inference,
            )
            return _simulated(subject) if self._simulates else of_estimate(subject)

    def side_by_side(
        self, subjects: Sequence[str], recipe_files: Sequence[str], *, quiet: bool
    ) -> Document:
        """The report on several recipes of one model."""
        sides = sides_of(
            _only(subjects, subjects[0]) if subjects else None,
            recipe_files,
            self._keys,
            self._gpu,
            simulates=bool(self._simulates),
            trusts=self._trusts,
            quiet=quiet,
        )
        models = {side.model for side in sides}
        if len(models) > 1:
            value = ", ".join(sorted(models))
            remedy = "give MODEL, or `memplan compare`"
            raise InputError("--recipe", value, "are several models", remedy)
        stems = [Path(file).stem for file in recipe_files]
        names = stems if len(set(stems)) == len(stems) else recipe_files
        shown = [
            dataclasses.replace(side, name=name)
            for side, name in zip(sides, names, strict=True)
        ]
        return sides_report.document(shown, self._gpu, json.versions())

    def _of_plan(self, plan: Plan) -> Report:
        source = read_config(plan.model, trust_remote_code=self._trusts)
        subject = Subject(
            architecture=architecture_of(source, trust_remote_code=self._trusts),
            recipe=plan.recipe,
            gpu=plan.gpu,
            versions=plan.versions or json.versions(),
        )
        return of_plan(plan, self._best(subject))

    def _of_run(self, run: Profile) -> Report:
        case = accuracy.case_of(run)
        subject = Subject(
            architecture=case.architecture,
            recipe=case.recipe,
            gpu=case.gpu,
            versions=json.versions(),
            inference=case.inference,
        )
        if case.gpu is None:
            found = accuracy.simulated(case, subject.versions)
            return of_run(run, of_simulation(subject, found, ()))
        return of_run(run, self._best(subject, case.settings))

    def _best(
        self, subject: Subject, settings: AllocatorSettings | None = None
    ) -> Report:
        """Simulated unless told otherwise or torch is missing, else estimated.

        The estimate is of the allocator as it is by default.
        """
        if self._simulates is False:
            return of_estimate(subject)
        try:
            return _simulated(subject, settings)
        except MissingExtraError:
            if self._simulates:
                raise
            return of_estimate(subject)

    def _subject(self, name: str) -> ModelSource | Plan | Profile:
        if Path(name).is_file():
            data = read_json(Path(name))
            kind = data.get("kind") if isinstance(data, dict) else None
            if kind == "plan":
                return Plan.from_json(data)
            if kind == KIND:
                return Profile.from_json(data, name)
            if kind is not None:
                remedy = "give its recipe with --recipe"
                problem = f"is neither a plan nor a run but of kind {kind}"
                raise InputError("PLAN or RUN", name, problem, remedy)
        try:
            return read_config(name, trust_remote_code=self._trusts)
        except UnknownNameError as error:
            try:
                return find_run(name, self._folder)
            except UnknownNameError:
                raise error from None


def _simulated(subject: Subject, settings: AllocatorSettings | None = None) -> Report:
    simulator = import_simulator(subject.recipe)
    course: list[Course] = []

    def record(samples: Iterator[Sample]) -> None:
        course.append(of_samples(samples))

    model, recipe, gpu = subject.architecture, subject.recipe, subject.gpu
    if subject.inference is None:
        found = simulator.run(model, recipe, gpu, settings, record=record)
    else:
        from memplan.simulator import inference

        asked = subject.inference
        found = inference.run(model, recipe, asked, gpu, settings, record=record)
    return of_simulation(subject, found, course[0])


def _only(subjects: Sequence[str], named: str | None) -> str:
    if len(subjects) > 1:
        remedy = "give one, or several models with --fits"
        raise InputError("MODEL", " ".join(subjects), "are several", remedy)
    return model_argument(subjects[0] if subjects else None, named)


def _fits(
    names: Sequence[str],
    keys: dict[str, Any],
    gpu: Gpu | None,
    *,
    trust_remote_code: bool,
) -> Document:
    """What fits, of the models that are named or of the catalog's."""
    if gpu is None:
        remedy = "give a card, a size such as 12GB, or auto"
        raise InputError("--gpu", "", "is missing", remedy)
    models = chosen_models(names, trust_remote_code=trust_remote_code)
    asked = ways()
    answers = [*what_fits(models, asked, keys, gpu, thorough=bool(names))]
    recipe = Recipe.from_mapping({**DEFAULTS, **keys})
    return fits_report.document(
        ranked(answers, asked), asked, gpu, recipe, json.versions()
    )


def _validation(places: Sequence[str], *, quiet: bool) -> Document:
    """Every run that is known, or those of the places, beside its prediction."""
    comparisons, left_out = compare_all(runs_at(places), quiet=quiet)
    return validation_report.document(comparisons, left_out, json.versions())


def _told(made: Document, written: Sequence[Path]) -> dict[str, Any]:
    return {
        "title": made.title,
        "verdict": made.verdict,
        "fits": made.fits,
        "files": [str(path) for path in written],
        "numbers": dict(made.numbers),
    }
