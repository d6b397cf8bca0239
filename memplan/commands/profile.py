"""`memplan profile`: a real short fine-tune, measured in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from memplan import runs
from memplan.commands.options import (
    RecipeCommand,
    given_keys,
    inference_options,
    json_option,
    model_argument,
    recipe_options,
    take_inference,
    take_recipe,
)
from memplan.errors import InputError, MeasurementError, MissingExtraError
from memplan.grid import GridRun, read_grid
from memplan.inference import Inference
from memplan.model_source import read_config
from memplan.profile import Profile
from memplan.reporters import json, terminal
from memplan.reporters import runs as reporter
from memplan.store import RUNS_FOLDER

FINISHED = ("ok", "out-of-memory")
"""Outcomes with which a grid's run is not measured again."""


@click.command(cls=RecipeCommand)
@click.argument("model", required=False)
@recipe_options
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=3,
    show_default=True,
    help="Steps of the optimizer; the first warms up.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="Where to measure; a CPU tells the bytes of tensors alone.",
)
@click.option(
    "--weights",
    is_flag=True,
    help="Load the checkpoint's weights instead of random ones.",
)
@click.option("--data", default="", metavar="FILE", help="Texts to train on, or JSONL.")
@inference_options
@click.option(
    "--generate",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Save what was tuned, load it anew and ask it for so many tokens.",
)
@click.option("--trace", is_flag=True, help="Keep the allocator's event history.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Begin no further step after so long.",
)
@click.option("--grid", "grid_file", metavar="FILE", help="Measure a file's runs.")
@click.option(
    "--out",
    metavar="FOLDER",
    default=str(RUNS_FOLDER),
    show_default=True,
    help="Where the measured runs are kept.",
)
@json_option
def command(
    model: str | None,
    grid_file: str | None,
    out: str,
    as_json: bool,
    **options: Any,
) -> int:
    """Measure a real short fine-tune, in a process of its own.

    MODEL is a catalog name, a hub id, a folder or a config.json. The run is kept as a
    file. Exits with 1 where memory does not suffice.
    """
    given = given_keys(options)
    inference = take_inference(options)
    recipe, named = take_recipe(options)
    settings = _Settings(inference=inference, **options)
    if inference is not None and settings.generate is not None:
        raise InputError(
            "--generate",
            settings.generate,
            "asks what was tuned, and --inference tunes nothing",
            "leave out either",
        )
    _check_installed()
    folder = Path(out)
    runs.prepare(folder)
    device = _find_device(settings.device)
    if settings.trace and device.kind == "cpu":
        raise InputError(
            "--trace",
            device.kind,
            "has no allocator whose events could be kept",
            "leave the option out, or measure on a card",
        )
    if grid_file is not None:
        return _run_grid(read_grid(grid_file, given), settings, device, folder)
    asked = GridRun(
        model=model_argument(model, named),
        recipe=recipe,
        inference=settings.inference,
    )
    run = _measure(asked, settings, device, folder, quiet=as_json)
    if run.outcome not in FINISHED or run.footprint is None:
        raise MeasurementError(f"{run.outcome}: {run.message}")
    _check_answer(run)
    if as_json:
        json.print_object(_object(run))
    else:
        reporter.report_run(run)
        terminal.say(f"Kept in {runs.path_of(run, folder)}")
    return 0 if run.outcome == "ok" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """The options that say how to measure."""

    steps: int
    device: str
    weights: bool
    data: str
    inference: Inference | None
    generate: int | None
    trace: bool
    seed: int
    time_limit: float | None


def _run_grid(
    grid: tuple[GridRun, ...], settings: _Settings, device: Any, folder: Path
) -> int:
    """Measures what of a grid is not measured yet; raises at the end what went wrong.

    A run that fails does not end the grid.
    """
    done = {run.id: run for run in runs.load(folder) if run.outcome in FINISHED}
    problems: list[str] = []
    reporter.report_header()
    for asked in grid:
        try:
            _, name = _task(asked, settings, device)
            run = done.get(name)
            if run is None:
                run = _measure(asked, settings, device, folder, quiet=False)
        except InputError as error:
            problems.append(f"{asked.model}: {error}")
            click.echo(f"memplan: {problems[-1]}", err=True)
            continue
        reporter.report_row(run)
        if run.outcome not in FINISHED:
            problems.append(f"{run.id}: {run.outcome}: {run.message}")
            click.echo(f"memplan: {problems[-1]}", err=True)
    if problems:
        raise MeasurementError(
            f"{len(problems)} of the grid's {len(grid)} runs could not be measured"
        )
    return 0


def _measure(
    asked: GridRun, settings: _Settings, device: Any, folder: Path, *, quiet: bool
) -> Profile:
    """The run, measured and kept; what was finished before Ctrl-C is kept too."""
    from memplan import profiler

    task, name = _task(asked, settings, device)
    if settings.trace and device.kind == "cuda":
        file = folder.parent / "traces" / f"{name}.jsonl.gz"
        task = dataclasses.replace(task, trace=str(file.absolute()))
    title = f"Measuring {name}"
    with terminal.progress(title, quiet=quiet) as told:
        try:
            run = profiler.run_task(
                task, name, progress=told, time_limit=settings.time_limit
            )
        except profiler.Interrupted as error:
            runs.save(error.run, folder)
            raise
    runs.save(run, folder)
    return run


def _check_answer(run: Profile) -> None:
    """Raises MeasurementError where what was tuned cannot be used."""
    if run.answer.get("problem"):
        raise MeasurementError(
            f"{run.id}: measured, but what was tuned cannot be used as it was saved: "
            f"{run.answer['problem']}"
        )


def _task(asked: GridRun, settings: _Settings, device: Any) -> tuple[Any, str]:
    """The task and the name of its run."""
    from memplan.profiler import name_of
    from memplan.profiler.task import Task

    source = read_config(asked.model)
    task = Task(
        model=source.name,
        config=source.config,
        recipe=asked.recipe,
        device=device.kind,
        steps=settings.steps,
        seed=settings.seed,
        weights="checkpoint" if settings.weights else "random",
        data=settings.data,
        inference=asked.inference,
        generate=0 if asked.inference else settings.generate or 0,
    )
    return task, name_of(task, device.card, json.versions())


def _find_device(asked: str) -> Any:
    from memplan.profiler import Device

    device = Device.find(asked)
    if device.note:
        click.echo(f"memplan: {device.note}", err=True)
    return device


def _check_installed() -> None:
    for package in ("torch", "transformers", "peft", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("profile", package, "torch")


def _object(run: Profile) -> dict[str, Any]:
    """The printed object: what `simulate` prints, as it was measured."""
    assert run.footprint is not None
    parameters = {"total": 0, "trainable": 0, **run.parameters}
    return json.footprint_object(
        "measurement",
        run.model,
        run.recipe,
        run.gpu,
        run.footprint,
        parameters,
        run.inference,
    ) | {
        "fits": None if run.device == "cpu" else run.outcome == "ok",
        "run": run.id,
        "device": run.device,
        "outcome": {"status": run.outcome, "message": run.message},
        "step_seconds": list(run.step_seconds),
        "answer": dict(run.answer),
        "notes": list(run.notes),
        "versions": json.versions() | dict(run.environment),
    }
