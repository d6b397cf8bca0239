"""`memplan schema`: the JSON schemas of what memplan reads and prints."""

from __future__ import annotations

import json

import click

from memplan.recipe import recipe_schema
from memplan.reporters.schema import output_schema, profile_schema


@click.command()
@click.argument("which", type=click.Choice(["recipe", "output", "profile"]))
def command(which: str) -> None:
    """Print the JSON schema of a recipe, the output or a run."""
    schemas = {
        "recipe": recipe_schema,
        "output": output_schema,
        "profile": profile_schema,
    }
    click.echo(json.dumps(schemas[which](), indent=2))
