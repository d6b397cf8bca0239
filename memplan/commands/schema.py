"""`memplan schema`: the JSON schemas of what memplan reads and prints."""

from __future__ import annotations

import json

import click

from memplan.recipe import recipe_schema
from memplan.reporters.schema import output_schema, plan_schema, profile_schema

SCHEMAS = {
    "recipe": recipe_schema,
    "output": output_schema,
    "plan": plan_schema,
    "profile": profile_schema,
}


@click.command()
@click.argument("which", type=click.Choice([*SCHEMAS]))
def command(which: str) -> None:
    """Print the JSON schema of a recipe, a plan, the output or a run."""
    click.echo(json.dumps(SCHEMAS[which](), indent=2))
