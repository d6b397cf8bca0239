"""`memplan estimate`: a fine-tune's memory at once, term by term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from memplan import estimator
from memplan.architecture import Architecture
from memplan.batching import Batch, batches, lengths_json, longest_batch
from memplan.commands.options import (
    RecipeCommand,
    asked_architecture,
    gpu_options,
    json_option,
    lengths_of,
    lengths_option,
    recipe_options,
    take_gpu,
    take_recipe_keys,
    trust_option,
)
from memplan.estimator.equations import terms
from memplan.estimator.limits import Limits, limits
from memplan.lengths import Lengths
from memplan.recipe import Recipe
from memplan.reporters import estimate as reporter
from memplan.reporters import json
from memplan.reporters.footprint import report_notes


@click.command(cls=RecipeCommand)
@click.argument("model", required=False)
@recipe_options
@gpu_options
@lengths_option
@click.option("--explain", is_flag=True, help="Print the equations with their numbers.")
@trust_option
@json_option
def command(
    model: str | None,
    lengths_file: str | None,
    explain: bool,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Estimate a fine-tune's memory at once, term by term.

    MODEL is a catalog name, a hub id, a folder or a config.json. Exits with 1 where the
    card is too small.
    """
    keys, named = take_recipe_keys(options)
    recipe = Recipe.from_mapping(keys)
    gpu = take_gpu(options)
    architecture = asked_architecture(model, named, trust_remote_code=trust_remote_code)
    found = lengths_of(lengths_file, architecture.name, keys)
    if found is not None:
        recipe = longest_batch(recipe, found, padded=keys.get("padded"))
    estimate = estimator.run(architecture, recipe, gpu)
    made = () if found is None else batches(architecture, recipe, gpu, found)
    room = None if gpu is None else limits(estimate, gpu)
    footprint = estimate.footprint
    listed = terms(estimate)
    if as_json:
        json.print_object(
            json.footprint_object(
                "estimate",
                architecture.name,
                recipe,
                gpu,
                footprint,
                estimate.parameters,
            )
            | {
                "margin_bytes": footprint.margin_bytes,
                "limits": None if room is None else room.to_json(),
                "terms": [term.to_json() for term in listed],
            }
            | ({} if found is None else {"lengths": lengths_json(found, made)})
        )
    else:
        reporter.report(architecture, recipe, gpu, estimate, listed)
        if explain:
            reporter.report_equations(listed)
        _report_rest(architecture, recipe, room, found, made)
        report_notes((*(gpu.assumptions if gpu else ()), *footprint.notes))
    return 1 if footprint.fits is False else 0


def _report_rest(
    architecture: Architecture,
    recipe: Recipe,
    room: Limits | None,
    found: Lengths | None,
    made: Sequence[Batch],
) -> None:
    if room is not None:
        reporter.report_limits(architecture, recipe, room)
    if found is not None:
        reporter.report_lengths(found, recipe, made)
