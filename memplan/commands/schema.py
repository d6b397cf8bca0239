"""`memplan schema`: the JSON schemas of what memplan reads and prints."""

from __future__ import annotations

import json

import click

from memplan.recipe import recipe_schema
from memplan.reporters.schema import output_schema


@click.command()
@click.argument("which", type=click.Choice(["recipe", "output"]))
def command(which: str) -> None:
    """Print the JSON schema of a recipe file or of the output."""
    schema = recipe_schema() if which == "recipe" else output_schema()
    click.echo(json.dumps(schema, indent=2))
