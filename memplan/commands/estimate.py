"""`memplan estimate`: a fine-tune's memory at once, term by term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from memplan.estimator import Estimate
from memplan.estimator.equations import Term, terms
from memplan.estimator.limits import Limits, limits
from memplan.gpu import Gpu
from memplan.inference import Inference
from memplan.recipe import Recipe
from memplan.reporters import estimate as reporter
from memplan.reporters import json
from memplan.reporters.footprint import report_notes, report_residuals
from memplan.residuals import Range, comparable_errors

if TYPE_CHECKING:
    from memplan.batching import Batch
    from memplan.estimator.inference import InferenceEstimate
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
    if inference is None:
        found = lengths_of(lengths_file, architecture.name, keys)
        told = _training(architecture, recipe, gpu, found, keys.get("padded"))
    else:
        _refuse_lengths(lengths_file)
        told = _answers(architecture, recipe, inference, gpu)
    if as_json:
        json.print_object(_object(architecture, gpu, told))
    else:
        _print(architecture, gpu, told, explain=explain)
    return 1 if told.estimate.footprint.fits is False else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Told:
    """What is told of an estimate."""

    recipe: Recipe
    estimate: Estimate | InferenceEstimate
    terms: tuple[Term, ...]
    room: Limits | None
    inference: Inference | None = None
    errors: Mapping[str, Range] | None = None
    """Those of comparable runs; None for inference, of which few were measured."""
    lengths: Lengths | None = None
    batches: Sequence[Batch] = ()


def _training(
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu | None,
    lengths: Lengths | None,
    padded: bool | None,
) -> _Told:
    made: Sequence[Batch] = ()
    if lengths is not None:
        from memplan import batching

        recipe = batching.longest_batch(recipe, lengths, padded=padded)
        made = batching.batches(architecture, recipe, gpu, lengths)
    estimate = estimator.replayed(estimator.run(architecture, recipe, gpu), gpu)
    return _Told(
        recipe=recipe,
        estimate=estimate,
        terms=terms(estimate),
        room=None if gpu is None else limits(estimate, gpu),
        errors=comparable_errors(recipe, gpu, "estimate"),
        lengths=lengths,
        batches=made,
    )


def _answers(
    architecture: Architecture, recipe: Recipe, inference: Inference, gpu: Gpu | None
) -> _Told:
    from memplan.estimator import inference as closed_form

    estimate = closed_form.run(architecture, recipe, inference, gpu)
    return _Told(
        recipe=recipe,
        estimate=estimate,
        terms=closed_form.inference_terms(estimate),
        room=None if gpu is None else closed_form.limits(estimate, gpu),
        inference=estimate.parts.inference,
    )


def _object(architecture: Architecture, gpu: Gpu | None, told: _Told) -> dict[str, Any]:
    """The object that is printed."""
    estimate = told.estimate
    shown = json.footprint_object(
        "estimate",
        architecture.name,
        told.recipe,
        gpu,
        estimate.footprint,
        estimate.parameters,
        told.inference,
    ) | {
        "margin_bytes": estimate.footprint.margin_bytes,
        "limits": None if told.room is None else told.room.to_json(),
        "terms": [term.to_json() for term in told.terms],
    }
    if told.errors is not None:
        shown["residuals"] = json.residuals(told.errors)
    if told.lengths is not None:
        from memplan import batching

        shown["lengths"] = batching.lengths_json(told.lengths, told.batches)
    return shown


def _print(
    architecture: Architecture, gpu: Gpu | None, told: _Told, *, explain: bool
) -> None:
    estimate, recipe = told.estimate, told.recipe
    reporter.report(architecture, recipe, gpu, estimate, told.terms, told.inference)
    if explain:
        reporter.report_equations(told.terms)
    if told.room is not None:
        reporter.report_limits(architecture, recipe, told.room)
    if told.lengths is not None:
        reporter.report_lengths(told.lengths, recipe, told.batches)
    if gpu is not None and told.errors is not None:
        report_residuals(recipe, gpu, told.errors)
    report_notes((*(gpu.assumptions if gpu else ()), *estimate.footprint.notes))


def _refuse_lengths(lengths_file: str | None) -> None:
    if lengths_file is not None:
        raise InputError(
            "--lengths",
            lengths_file,
            "is of training's batches",
            "leave it out, or --inference",
        )
