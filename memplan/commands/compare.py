"""`memplan compare`: fine-tunes side by side, term by term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from memplan import estimator
from memplan.architecture import Architecture
from memplan.catalog import architecture_of
from memplan.commands.options import (
    RecipeCommand,
    gpu_options,
    json_option,
    key_options,
    model_argument,
    read_recipe_file,
    take_gpu,
    take_keys,
    trust_option,
    without_compiler,
)
from memplan.commands.simulate import import_simulator
from memplan.comparison import FIELD, T4_PREFIX, Side, measured_t4, side_of
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.model_source import read_config
from memplan.recipe import Recipe
from memplan.reporters import comparison, terminal
from memplan.reporters.footprint import report_notes
from memplan.store import read_json


@click.command(cls=RecipeCommand)
@click.argument("model", required=False)
@click.option(
    "--recipe",
    "recipe_files",
    multiple=True,
    metavar="FILE",
    help="A recipe file, one for each side; options given as well win in all of them.",
)
@click.option(
    FIELD,
    "others",
    multiple=True,
    metavar="FILE",
    help="A side as --json printed it or as it was measured; t4:N is a measured run.",
)
@click.option("--simulate", is_flag=True, help="Simulate recipes, not estimate them.")
@key_options
@gpu_options
@trust_option
@json_option
def command(  # noqa: PLR0913 - each is an option
    model: str | None,
    recipe_files: tuple[str, ...],
    others: tuple[str, ...],
    simulate: bool,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare fine-tunes, term by term.

    MODEL is a catalog name, a hub id, a folder or a config.json; it may be left out
    where recipe files name theirs. The first side is what the others are set against.
    """
    keys = take_keys(options)
    gpu = take_gpu(options)
    _check_count(recipe_files, others)
    sides = sides_of(
        model,
        recipe_files,
        keys,
        gpu,
        simulates=simulate,
        trusts=trust_remote_code,
        quiet=as_json,
    )
    sides += [_read(other) for other in others]
    notes = (*(gpu.assumptions if gpu else ()), *_notes(sides))
    if as_json:
        comparison.report_object(tuple(sides), gpu, notes)
    else:
        comparison.report(tuple(sides))
        report_notes(notes)


def sides_of(  # noqa: PLR0913 - each is a part of what is asked
    model: str | None,
    recipe_files: Sequence[str],
    keys: Mapping[str, Any],
    gpu: Gpu | None,
    *,
    simulates: bool,
    trusts: bool,
    quiet: bool,
) -> list[Side]:
    """What each recipe file takes, where keys that are given win in all of them."""
    sides = []
    for file in recipe_files:
        given, named = read_recipe_file(file)
        recipe = Recipe.from_mapping(given | dict(keys))
        source = read_config(model_argument(model, named), trust_remote_code=trusts)
        architecture = architecture_of(source, trust_remote_code=trusts)
        sides.append(
            _simulated(file, architecture, recipe, gpu, quiet=quiet)
            if simulates
            else _estimated(file, architecture, recipe, gpu)
        )
    return sides


def _check_count(recipe_files: tuple[str, ...], others: tuple[str, ...]) -> None:
    sides = (*recipe_files, *others)
    remedy = f"give --recipe or {FIELD} at least twice in all, the first side first"
    if len(sides) < 2:
        raise InputError("--recipe", ", ".join(sides), "is but one side", remedy)
    if len(sides) > comparison.MOST_SIDES:
        problem = f"are more than {comparison.MOST_SIDES} sides"
        raise InputError("--recipe", f"{len(sides)} files", problem, "give fewer")
    if recipe_files.count("-") > 1:
        raise InputError("--recipe", "-", "is read twice", "give files instead")


def _estimated(
    name: str, architecture: Architecture, recipe: Recipe, gpu: Gpu | None
) -> Side:
    found = estimator.replayed(estimator.run(architecture, recipe, gpu), gpu)
    return _side(name, "estimate", architecture, recipe, found)


def _simulated(
    name: str,
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu | None,
    *,
    quiet: bool,
) -> Side:
    with (
        terminal.progress(f"Simulating {name}", quiet=quiet) as told,
        without_compiler(),
    ):
        told("imports")
        found = import_simulator(recipe).run(architecture, recipe, gpu, progress=told)
    return _side(name, "simulation", architecture, recipe, found)


def _side(
    name: str, kind: str, architecture: Architecture, recipe: Recipe, found: Any
) -> Side:
    footprint: Footprint = found.footprint
    return Side(
        name=name,
        kind=kind,
        model=architecture.name,
        recipe=recipe.to_json(),
        footprint=footprint,
        parameters=found.parameters,
    )


def _read(other: str) -> Side:
    """The side that `--against` names."""
    if other.startswith(T4_PREFIX) and not Path(other).exists():
        return measured_t4(other)
    try:
        data = read_json(Path(other))
    except InputError as error:
        raise InputError(
            FIELD, other, "cannot be read as JSON", "give a file that --json printed"
        ) from error
    return side_of(other, data)


def _notes(sides: list[Side]) -> tuple[str, ...]:
    """Notes of all sides, each once."""
    return tuple(dict.fromkeys(note for one in sides for note in one.footprint.notes))
