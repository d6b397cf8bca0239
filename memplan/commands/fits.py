"""`memplan fits`: what fits on a card, models by ways to fine-tune them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from memplan.architecture import Architecture
from memplan.batching import longest_batch
from memplan.catalog import architecture_of, catalog_models
from memplan.commands.models import of_family
from memplan.commands.options import (
    RecipeCommand,
    gpu_options,
    json_option,
    lengths_of,
    lengths_option,
    recipe_options,
    required_gpu,
    take_recipe_keys,
    trust_option,
)
from memplan.errors import InputError
from memplan.fits import DEFAULTS, Answer, ranked, ways, what_fits
from memplan.model_source import read_config
from memplan.recipe import Recipe
from memplan.reporters import fits as reporter
from memplan.reporters import terminal
from memplan.reporters.footprint import report_notes
from memplan.units import parse_count

TOP = 8
"""Models that a terminal shows for each way."""


@click.command(cls=RecipeCommand)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@recipe_options
@gpu_options
@lengths_option
@click.option("--family", help="Only models of this family: llama, say.")
@click.option("--max-params", help="Only models of at most so many parameters: 8B.")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=TOP,
    metavar="N",
    help=f"Show the N largest models of each way [{TOP}].",
)
@click.option("--all", "show_all", is_flag=True, help="Show every model that fits.")
@click.option(
    "--format",
    "form",
    type=click.Choice(tuple(reporter.FORMATS)),
    help="Print every answer so instead.",
)
@trust_option
@json_option
def command(  # noqa: PLR0913 - each is an option
    models: tuple[str, ...],
    lengths_file: str | None,
    family: str | None,
    max_params: str | None,
    top: int,
    show_all: bool,
    form: str | None,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Say what fits on a card: models by ways to fine-tune them.

    MODEL is as elsewhere; without one it is every model of the catalog. --method and
    --quantization take several names with commas between. Exits with 1 where nothing
    fits.
    """
    keys, named = take_recipe_keys(options)
    asked = ways(_names(keys, "method"), _names(keys, "quantization"))
    gpu = required_gpu(options)
    given = models or ((named,) if named else ())
    chosen = chosen_models(
        given, family, max_params, trust_remote_code=trust_remote_code
    )
    found = lengths_of(lengths_file, given[0] if given else "", keys)
    if found is not None:
        recipe = Recipe.from_mapping({**DEFAULTS, **keys})
        longest = longest_batch(recipe, found, padded=keys.get("padded"))
        keys |= {"sequence_length": longest.sequence_length, "padded": longest.padded}
    quiet = as_json or form is not None
    with terminal.progress("Estimating", quiet=quiet) as told:
        answers = []
        for answer in what_fits(chosen, asked, keys, gpu, thorough=bool(given)):
            answers.append(answer)
            told(answer.architecture.name)
    _check_any(answers)
    if not given:
        answers = ranked(answers, asked)
    notes = (*gpu.assumptions, *_notes(answers, given))
    if as_json:
        reporter.report_object(gpu, keys, answers, notes, found)
    elif form is not None:
        reporter.write(answers, form)
    else:
        if given:
            reporter.report_models(answers, gpu, found)
        else:
            reporter.report(answers, asked, gpu, None if show_all else top, found)
        report_notes(notes)
    return 0 if any(answer.fits for answer in answers) else 1


def _names(keys: dict[str, Any], key: str) -> tuple[str, ...]:
    """The names under a key, which is taken out."""
    text = keys.pop(key, None)
    if text is None:
        return ()
    if not isinstance(text, str):
        raise InputError(key, text, "is not a name", "give names with commas between")
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def chosen_models(
    names: Sequence[str],
    family: str | None = None,
    max_params: str | None = None,
    *,
    trust_remote_code: bool,
) -> list[Architecture]:
    """The models that are meant: those named, or the catalog's that generate text."""
    most = math.inf if max_params is None else parse_count(max_params, "--max-params")
    if names:
        sources = [
            read_config(name, trust_remote_code=trust_remote_code) for name in names
        ]
        found = [
            architecture_of(source, trust_remote_code=trust_remote_code)
            for source in sources
        ]
        if family is not None:
            found = [one for one in found if one.model_type == family.casefold()]
    else:
        catalog = catalog_models()
        if family is not None:
            catalog = of_family(catalog, family)
        found = [one.architecture for one in catalog if one.architecture.generative]
    kept = [one for one in found if one.total_parameters <= most]
    if not kept:
        asked = " ".join(filter(None, (*names, family, max_params)))
        remedy = "`memplan models` lists them with families and sizes"
        raise InputError("MODEL", asked, "leaves no model to fine-tune", remedy)
    return kept


def _check_any(answers: Sequence[Answer]) -> None:
    """Raises InputError where no model can be trained in any way that was asked for."""
    if not all(answer.problem for answer in answers):
        return
    problem, _, remedy = answers[0].problem.rpartition("; ")
    told = f"cannot be estimated in any of these ways ({problem})"
    raise InputError("MODEL", answers[0].architecture.name, told, remedy)


def _notes(answers: Sequence[Answer], given: Sequence[str]) -> list[str]:
    """What is worth knowing of models that are left out."""
    if given:
        return []
    problems = [answer for answer in answers if answer.problem]
    if not problems:
        return []
    first = problems[0]
    return [
        f"{len(problems)} of {len(answers)} answers are missing; the first, on "
        f"{first.architecture.name} with {first.way.name}: {first.problem}"
    ]
