"""`memplan simulate`: the peak of a fine-tune, byte for byte, without a card."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import click

from memplan import results
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.commands.life_options import life_options, take_life
from memplan.commands.options import (
    RecipeCommand,
    asked_architecture,
    gpu_options,
    inference_options,
    json_option,
    recipe_options,
    take_gpu,
    take_inference,
    take_recipe,
    trust_option,
    without_compiler,
)
from memplan.errors import InputError, MissingExtraError
from memplan.gpu import Gpu
from memplan.inference import Inference
from memplan.life import NO_LIFE, Life, LifeOptions
from memplan.recipe import Recipe
from memplan.reporters import footprint, json, terminal, timeline
from memplan.residuals import comparable_errors
from memplan.simulation import Sample, Simulation


@click.command(cls=RecipeCommand)
@click.argument("model", required=False)
@recipe_options
@gpu_options
@inference_options
@life_options
@click.option(
    "--timeline",
    "timeline_file",
    metavar="FILE",
    help="Write memory over the life, as .csv or .json.",
)
@click.option("--allocator", help="As PYTORCH_CUDA_ALLOC_CONF takes it.")
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Show the N largest tensors at the peak.",
)
@trust_option
@json_option
def command(  # noqa: PLR0913 - each is an option
    model: str | None,
    timeline_file: str | None,
    allocator: str | None,
    top: int,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Simulate a fine-tune's memory, or inference's, byte for byte.

    MODEL is a catalog name, a hub id, a folder or a config.json. Exits with 1 where the
    card is too small.
    """
    recipe, named = take_recipe(options)
    on_windows = options["os_name"] == "windows"
    gpu = take_gpu(options)
    inference = take_inference(options)
    asked = take_life(options)
    if inference is not None:
        _refuse_life(asked)
    record = timeline.writer_of(timeline_file) if timeline_file else None
    settings = AllocatorSettings.parse(allocator or "", on_windows=on_windows)
    architecture = asked_architecture(model, named, trust_remote_code=trust_remote_code)
    life = NO_LIFE if inference else asked.choose(architecture, recipe)
    task = _Task(architecture, recipe, gpu, settings, life, inference, record)
    simulation = _run(task, quiet=as_json)
    if as_json:
        json.print_object(
            json.footprint_object(
                "simulation",
                architecture.name,
                recipe,
                gpu,
                simulation.footprint,
                simulation.parameters,
                inference,
            )
            | {
                "host": dict(simulation.host),
                "residuals": json.residuals(
                    {} if inference else comparable_errors(recipe, gpu)
                ),
            }
        )
    else:
        footprint.report_simulation(
            architecture, recipe, gpu, simulation, top, inference
        )
        if gpu is not None and inference is None:
            errors = comparable_errors(recipe, gpu)
            footprint.report_residuals(recipe, gpu, errors)
    return 1 if simulation.footprint.fits is False else 0


@dataclass(frozen=True, slots=True)
class _Task:
    """What is to be simulated."""

    architecture: Architecture
    recipe: Recipe
    gpu: Gpu | None
    settings: AllocatorSettings
    life: Life
    inference: Inference | None
    """What is asked for in the place of a fine-tune, if anything is."""
    record: Callable[[Iterable[Sample]], None] | None
    """What takes the memory over the life, where it is asked for."""

    @property
    def key(self) -> str:
        """The name under which the simulation is kept."""
        inputs = {
            "architecture": self.architecture.to_json(),
            "recipe": self.recipe.to_json(),
            "gpu": None if self.gpu is None else self.gpu.to_json(),
            "allocator": dataclasses.asdict(self.settings),
            "life": dataclasses.asdict(self.life),
            "inference": self.inference and dataclasses.asdict(self.inference),
        }
        return results.key(inputs, json.versions())


def _run(task: _Task, *, quiet: bool) -> Simulation:
    """The simulation, as it was kept from an earlier run or run now.

    What is kept has no timeline.
    """
    name = task.key
    known = results.load(name) if task.record is None else None
    if known is not None:
        return known
    with (
        terminal.progress(f"Simulating {task.architecture.name}", quiet=quiet) as told,
        without_compiler(),
    ):
        told("imports")
        simulator = import_simulator(task.recipe)
        simulation = _simulate(task, simulator, told)
    results.keep(name, simulation)
    return simulation


def _simulate(task: _Task, simulator: Any, told: Callable[[str], None]) -> Simulation:
    if task.inference is not None:
        from memplan.simulator import inference

        return inference.run(
            task.architecture,
            task.recipe,
            task.inference,
            task.gpu,
            task.settings,
            told,
            record=task.record,
        )
    found: Simulation = simulator.run(
        task.architecture,
        task.recipe,
        task.gpu,
        task.settings,
        told,
        life=task.life,
        record=task.record,
    )
    return found


def _refuse_life(asked: LifeOptions) -> None:
    """Raises InputError for moments of a fine-tune's life beside inference."""
    if asked != LifeOptions():
        raise InputError(
            "--inference",
            "true",
            "asks for no fine-tune, whose life other options are of",
            "leave out either",
        )


def import_simulator(recipe: Recipe) -> Any:
    """The simulator and its libraries, which the process keeps until it ends.

    So there is no garbage among them to be looked for, while they load or later. What
    bitsandbytes lacks on this machine's processor is of no interest.
    """
    collects = gc.isenabled()
    gc.disable()
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    try:
        from memplan import simulator

        if recipe.method != "full":
            importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise MissingExtraError("simulate", error.name or "torch", "torch") from error
    finally:
        bitsandbytes.setLevel(level)
        gc.freeze()
        if collects:
            gc.enable()
    return simulator
