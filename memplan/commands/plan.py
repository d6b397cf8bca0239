"""`memplan plan`: the recipe, and a rank for every module, that fit a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from memplan.architecture import Architecture
from memplan.commands.options import (
    RecipeCommand,
    asked_architecture,
    gpu_options,
    json_option,
    lengths_of,
    lengths_option,
    recipe_options,
    required_gpu,
    take_recipe_keys,
    trust_option,
    without_compiler,
)
from memplan.commands.simulate import import_simulator
from memplan.errors import InputError, MissingExtraError
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.lengths import Lengths
from memplan.planner import choices, decide
from memplan.planner.choices import Estimate, Floors
from memplan.planner.means import less_margin, means_on
from memplan.planner.modules import GRANULARITIES, adapted_linears
from memplan.planner.ranks import DEFAULT_PRIOR, EXPLAINED_VARIANCE, ROBUST
from memplan.planner.value import priors
from memplan.recipe import Recipe
from memplan.reporters import json, terminal
from memplan.reporters import plan as reporter
from memplan.units import format_bytes, parse_size
from memplan.values import Values, keep_values, read_values

MISSING_PRECISION = 1
"""What a recipe that does not fit lacks is bounded by its peak without a limit, and not
looked for: every look is a replay of the whole step."""


@click.command(cls=RecipeCommand)
@click.argument("model", required=False)
@recipe_options
@gpu_options
@lengths_option
@click.option(
    "--prefer",
    type=click.Choice(choices.PREFERENCES),
    default=choices.PREFERENCES[0],
    show_default=True,
    help="What is aimed at first, once it fits.",
)
@click.option("--min-seq", type=click.IntRange(min=1), help="Tokens at least [512].")
@click.option(
    "--effective-batch",
    type=click.IntRange(min=1),
    help=f"Sequences of an optimizer step [{choices.EFFECTIVE_BATCH}].",
)
@click.option("--min-rank", type=click.IntRange(min=1), default=choices.RANKS[0])
@click.option(
    "--ranks",
    type=click.Choice(GRANULARITIES),
    default="by-type",
    show_default=True,
    help="What shares a rank.",
)
@click.option(
    "--prior",
    type=click.Choice([ROBUST, EXPLAINED_VARIANCE, *priors.names()]),
    help=f"What a rank is worth [{DEFAULT_PRIOR}; {EXPLAINED_VARIANCE} where values "
    "are given].",
)
@click.option(
    "--data",
    metavar="FILE",
    help="Texts, or JSONL, for which values of the checkpoint's layers are measured.",
)
@click.option(
    "--values",
    "values_file",
    metavar="FILE",
    help="Values that --data kept; with --data, where to keep them.",
)
@click.option(
    "--bits",
    is_flag=True,
    help="Leave unquantised what quantising costs most, where memory is left; needs "
    "values.",
)
@click.option("--margin", help="What of the budget stays free [2 %].")
@click.option(
    "--alternatives",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Show N other recipes that nothing beats.",
)
@trust_option
@json_option
def command(  # noqa: PLR0913 - each is an option
    model: str | None,
    lengths_file: str | None,
    prefer: str,
    min_seq: int | None,
    effective_batch: int | None,
    min_rank: int,
    ranks: str,
    prior: str | None,
    data: str | None,
    values_file: str | None,
    bits: bool,
    margin: str | None,
    alternatives: int,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Choose the recipe, and a rank for every module, that fit a card.

    MODEL is a catalog name, a hub id, a folder or a config.json. Options and keys of a
    recipe that are given stay as they are; the others are chosen. What is chosen has
    been simulated on the card.
    """
    keys, named = take_recipe_keys(options)
    gpu = required_gpu(options)
    architecture = asked_architecture(model, named, trust_remote_code=trust_remote_code)
    lengths = lengths_of(lengths_file, architecture.name, keys)
    if lengths is not None:
        keys |= {"sequence_length": _longest(lengths, min_seq)}
    base = Recipe.from_mapping(keys)
    whole = _effective_batch(effective_batch, base, keys)
    if effective_batch is not None and "accumulation" in keys:
        keys |= {"batch_size": whole // base.accumulation}
        base = Recipe.from_mapping(keys)
    floors = Floors(
        sequence_length=min_seq or base.sequence_length,
        effective_batch=whole,
        rank=min_rank,
        margin_bytes=_margin(margin, gpu),
        ragged=lengths is not None and lengths.differ,
    )
    if data is not None and values_file is None:
        values_file = f"{Path(architecture.name).name}.values.json"
    values = _values(architecture, base, data, values_file, quiet=as_json)
    if values is None and (bits or prior == EXPLAINED_VARIANCE):
        field = "--bits" if bits else "--prior"
        raise InputError(
            field, prior or "", "needs values", "give --values, or --data to measure"
        )
    asked = decide.Asked(
        base=base,
        given=frozenset(keys),
        floors=floors,
        prefer=prefer,
        granularity=ranks,
        prior=prior or (DEFAULT_PRIOR if values is None else EXPLAINED_VARIANCE),
        values=values,
        spares=bits,
        alternatives=alternatives,
        lengths=lengths,
    )
    title = f"Planning {architecture.name}"
    with terminal.progress(title, quiet=as_json), without_compiler():
        margin_bytes = floors.margin_bytes
        verify = simulation_on(architecture, gpu, base, margin_bytes)
        means = means_on(architecture, gpu, margin_bytes, verify)
        made = decide.plan(architecture, gpu, asked, means)
    if values is not None:
        told = f"What was measured of the layers is in {values_file}."
        made = dataclasses.replace(made, notes=(*made.notes, told))
    made = dataclasses.replace(made, versions=json.versions())
    if as_json:
        json.print_object(made.to_json())
    else:
        reporter.report(made)
    return 0


def _values(
    architecture: Architecture,
    base: Recipe,
    data: str | None,
    file: str | None,
    *,
    quiet: bool,
) -> Values | None:
    """The values in the file, or those that the data are measured for and kept there.

    Where no scheme is given, errors are those of the one that a plan would take.
    """
    if data is None:
        return None if file is None else read_values(file)
    try:
        from memplan.profiler import Device
        from memplan.profiler.values import measure_values
    except ModuleNotFoundError as error:
        raise MissingExtraError("--data", error.name or "torch", "torch") from error
    quantization = base.quantization
    if quantization == choices.QUANTIZATIONS[0]:
        quantization = choices.QUANTIZATIONS[-1]
    measured = dataclasses.replace(base, quantization=quantization)
    with terminal.progress(f"Looking at {architecture.name}", quiet=quiet):
        values = measure_values(
            architecture,
            measured,
            adapted_linears(architecture, base),
            data=data,
            device=Device.find("auto").kind,
        )
    keep_values(values, str(file))
    return values


def simulation_on(
    architecture: Architecture, gpu: Gpu, base: Recipe, margin_bytes: int
) -> Estimate | None:
    """The simulated footprint within the budget less the margin; None without torch."""
    try:
        simulator = import_simulator(base)
    except MissingExtraError:
        return None

    def simulated(recipe: Recipe, card: Gpu) -> Footprint:
        run = simulator.run(
            architecture,
            recipe,
            card,
            missing_precision=MISSING_PRECISION,
            advises=False,
        )
        found: Footprint = run.footprint
        return found

    return less_margin(gpu, margin_bytes, simulated)


def _longest(lengths: Lengths, min_seq: int | None) -> int:
    """The longest sample, which a plan is for where lengths are known."""
    if min_seq is not None:
        raise InputError(
            "--min-seq",
            min_seq,
            "stands against --lengths, whose longest sample is the length",
            "leave one of the two out; --seq cuts longer samples",
        )
    return lengths.longest


def _effective_batch(asked: int | None, base: Recipe, given: Collection[str]) -> int:
    """The sequences of an optimizer step.

    Raises InputError where the batch that is given does not make them.
    """
    if asked is None:
        return choices.EFFECTIVE_BATCH
    made = base.batch_size if "batch_size" in given else 1
    made *= base.accumulation if "accumulation" in given else 1
    whole = {"batch_size", "accumulation"} <= set(given)
    if asked % made or (whole and asked != made):
        raise InputError(
            "--effective-batch",
            asked,
            f"is not made of the {made} sequences that are given",
            "leave --batch or --accumulation out, or give what divides it",
        )
    return asked


def _margin(text: str | None, gpu: Gpu) -> int:
    if text is not None:
        margin_bytes = parse_size(text, "--margin")
        if margin_bytes >= gpu.budget_bytes:
            raise InputError(
                "--margin",
                text,
                f"leaves nothing of the {format_bytes(gpu.budget_bytes)} that "
                f"{gpu.name} has for training",
                "give less, or a larger card",
            )
        return margin_bytes
    return int(choices.MARGIN_SHARE * gpu.budget_bytes)
