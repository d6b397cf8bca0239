"""`memplan why-not`: why a recipe does not fit, and what would change it."""

from __future__ import annotations

from typing import Any

import click

from memplan.commands.options import (
    RecipeCommand,
    asked_architecture,
    gpu_options,
    json_option,
    recipe_options,
    required_gpu,
    take_recipe,
    trust_option,
    without_compiler,
)
from memplan.planner.means import means_on
from memplan.planner.why_not import Question
from memplan.reporters import json, terminal
from memplan.reporters import why_not as reporter


@click.command(cls=RecipeCommand)
@click.argument("model", required=False)
@recipe_options
@gpu_options
@trust_option
@json_option
def command(
    model: str | None, trust_remote_code: bool, as_json: bool, **options: Any
) -> int:
    """Say why a recipe does not fit a card, and what would change it.

    MODEL is a catalog name, a hub id, a folder or a config.json. Exits with 1 where the
    recipe does not fit.
    """
    recipe, named = take_recipe(options)
    gpu = required_gpu(options)
    architecture = asked_architecture(model, named, trust_remote_code=trust_remote_code)
    means = means_on(architecture, gpu, margin_bytes=0)
    question = Question(
        architecture=architecture,
        recipe=recipe,
        gpu=gpu,
        estimate=means.estimate,
        confirm=means.screen,
    )
    title = f"Looking at {architecture.name}"
    with terminal.progress(title, quiet=as_json), without_compiler():
        answer = reporter.answer_of(question)
    if as_json:
        json.report_object("why-not", answer)
    else:
        reporter.report(question, answer)
    return 1 if question.missing_bytes > 0 else 0
