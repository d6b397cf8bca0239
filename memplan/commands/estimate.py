"""`memplan estimate`: a fine-tune's memory at once, term by term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from memplan import estimator
from memplan.architecture import Architecture
from memplan.commands.options import (
    RecipeCommand,
    asked_architecture,
    gpu_options,
    inference_options,
    json_option,
    lengths_of,
    lengths_option,
    recipe_options,
    take_gpu,
    take_inference,
    take_recipe_keys,
    trust_option,
)
from memplan.errors import InputError
from memplan.estimator.equations import terms
from memplan.estimator.limits import Limits, limits
from memplan.gpu import Gpu
from memplan.inference import Inference
from memplan.recipe import Recipe
from memplan.reporters import estimate as reporter
from memplan.reporters import json
from memplan.reporters.footprint import report_notes, report_residuals
from memplan.residuals import comparable_errors

if TYPE_CHECKING:
    from memplan.batching import Batch
    from memplan.lengths import Lengths


@click.command(cls=RecipeCommand)
@click.argument("model", required=False)
@recipe_options
@gpu_options
@lengths_option
@inference_options
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
    """Estimate a fine-tune's memory, or inference's, term by term.

    MODEL is a catalog name, a hub id, a folder or a config.json. Exits with 1 where the
    card is too small.
    """
    keys, named = take_recipe_keys(options)
    recipe = Recipe.from_mapping(keys)
    gpu = take_gpu(options)
    inference = take_inference(options)
    architecture = asked_architecture(model, named, trust_remote_code=trust_remote_code)
    if inference is not None:
        _refuse_lengths(lengths_file)
        return _answer(architecture, recipe, inference, gpu, explain, as_json)
    found = lengths_of(lengths_file, architecture.name, keys)
    made: Sequence[Batch] = ()
    of_lengths: dict[str, Any] = {}
    if found is not None:
        from memplan import batching

        recipe = batching.longest_batch(recipe, found, padded=keys.get("padded"))
        made = batching.batches(architecture, recipe, gpu, found)
        of_lengths = {"lengths": batching.lengths_json(found, made)}
    estimate = estimator.replayed(estimator.run(architecture, recipe, gpu), gpu)
    room = None if gpu is None else limits(estimate, gpu)
    footprint = estimate.footprint
    listed = terms(estimate)
    errors = comparable_errors(recipe, gpu, "estimate")
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
                "residuals": json.residuals(errors),
            }
            | of_lengths
        )
    else:
        reporter.report(architecture, recipe, gpu, estimate, listed)
        if explain:
            reporter.report_equations(listed)
        _report_rest(architecture, recipe, room, found, made)
        if gpu is not None:
            report_residuals(recipe, gpu, errors)
        report_notes((*(gpu.assumptions if gpu else ()), *footprint.notes))
    return 1 if footprint.fits is False else 0


def _answer(  # noqa: PLR0913 - each is a part of what is asked and told
    architecture: Architecture,
    recipe: Recipe,
    inference: Inference,
    gpu: Gpu | None,
    explain: bool,
    as_json: bool,
) -> int:
    """Estimates and prints inference; the exit code."""
    from memplan.estimator import inference as closed_form

    estimate = closed_form.run(architecture, recipe, inference, gpu)
    inference = estimate.parts.inference
    room = None if gpu is None else closed_form.limits(estimate, gpu)
    footprint = estimate.footprint
    listed = closed_form.inference_terms(estimate)
    if as_json:
        json.print_object(
            json.footprint_object(
                "estimate",
                architecture.name,
                recipe,
                gpu,
                footprint,
                estimate.parameters,
                inference,
            )
            | {
                "margin_bytes": footprint.margin_bytes,
                "limits": None if room is None else room.to_json(),
                "terms": [term.to_json() for term in listed],
            }
        )
    else:
        reporter.report(architecture, recipe, gpu, estimate, listed, inference)
        if explain:
            reporter.report_equations(listed)
        if room is not None:
            reporter.report_limits(architecture, recipe, room)
        report_notes((*(gpu.assumptions if gpu else ()), *footprint.notes))
    return 1 if footprint.fits is False else 0


def _refuse_lengths(lengths_file: str | None) -> None:
    if lengths_file is not None:
        raise InputError(
            "--lengths",
            lengths_file,
            "is of training's batches",
            "leave it out, or --inference",
        )


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
