"""`memplan export`: a plan or a recipe as the files that a trainer takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from memplan import exporters
from memplan.catalog import architecture_of
from memplan.checks import check
from memplan.commands.options import (
    json_option,
    model_argument,
    read_printed_file,
    trust_option,
)
from memplan.commands.simulate import without_compiler
from memplan.model_source import read_config
from memplan.plan import decision_hash
from memplan.recipe import Recipe
from memplan.reporters import json


@click.command()
@click.argument("plan")
@click.option(
    "--to",
    "trainer",
    required=True,
    metavar="TRAINER",
    help=f"Whose files: {', '.join(exporters.names())}.",
)
@click.option("--out", required=True, metavar="DIR", help="The folder to write.")
@click.option("--model", help="The model, where the file names none.")
@trust_option
@json_option
def command(  # noqa: PLR0913 - each is an option
    plan: str,
    trainer: str,
    out: str,
    model: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Write a plan or a recipe as the files that a trainer takes.

    PLAN is a plan, a recipe file, what any command printed with --json, or - for
    standard input. What is written was checked first, and says what could not be.
    """
    exporters.find(trainer)
    printed = read_printed_file(plan)
    recipe = Recipe.from_mapping(printed.recipe)
    source = read_config(
        model_argument(model, printed.model), trust_remote_code=trust_remote_code
    )
    architecture = architecture_of(source, trust_remote_code=trust_remote_code)
    check(architecture, recipe)
    gpu = printed.printed.get("gpu")
    task = exporters.Task(
        model=model or printed.model or architecture.name,
        architecture=architecture,
        recipe=recipe,
        hash=decision_hash(architecture.name, recipe, gpu),
        predicted=printed.printed.get("peak"),
        predicted_by=_predicted_by(printed.printed),
        card=gpu["name"] if isinstance(gpu, Mapping) else None,
    )
    with without_compiler():
        written, statement = exporters.export(task, trainer, Path(out))
    _report(task, trainer, written, statement, as_json)


def _predicted_by(printed: Mapping[str, Any]) -> str:
    """What said the peak: the kind of the object, or what verified the plan."""
    if isinstance(printed.get("plan"), Mapping):
        return str(printed["plan"].get("verified_by", "plan"))
    return str(printed.get("kind", "recipe"))


def _report(
    task: exporters.Task,
    trainer: str,
    written: tuple[Path, ...],
    statement: exporters.Statement,
    as_json: bool,
) -> None:
    if as_json:
        body: dict[str, Any] = {
            "model": task.model,
            "recipe": task.recipe.to_json(),
            "trainer": trainer,
            "files": [str(path) for path in written],
            "verified": list(statement.verified),
            "unverified": list(statement.unverified),
        }
        json.report_object("export", body)
        return
    for path in written:
        click.echo(f"Wrote {path}")
    for sentence in statement.verified:
        click.echo(f"Verified: {sentence}")
    for sentence in statement.unverified:
        click.echo(f"Not verified: {sentence}")
