"""`memplan inspect`: what a model is made of."""

from __future__ import annotations

import click

from memplan.catalog import architecture_of
from memplan.commands.options import json_option, trust_option
from memplan.model_source import read_config
from memplan.reporters import architecture, json

INSPECTED_ONLY = (
    "This is no causal language model: memplan can inspect it, and nothing else."
)


@click.command()
@click.argument("model")
@trust_option
@json_option
def command(model: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show what a model is made of.

    MODEL is a catalog name, a hub id, a folder or a config.json.
    """
    source = read_config(model, trust_remote_code=trust_remote_code)
    inspected = architecture_of(source, trust_remote_code=trust_remote_code)
    limits = () if inspected.generative else (INSPECTED_ONLY,)
    notes = (*inspected.notes, *source.notes, *limits)
    if as_json:
        json.report_architecture(inspected, notes)
    else:
        architecture.report(inspected, notes)
