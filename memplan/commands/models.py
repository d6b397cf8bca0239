"""`memplan models`: the models that the catalog knows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click

from memplan.catalog import CatalogModel, catalog_models
from memplan.commands.options import json_option
from memplan.errors import UnknownNameError
from memplan.reporters import catalog, json
from memplan.units import parse_count


@click.command()
@click.argument("search", required=False, default="")
@click.option("--family", help="Only models of this family: llama, say.")
@click.option("--max-params", help="Only models of at most so many parameters: 8B.")
@json_option
def command(
    search: str, family: str | None, max_params: str | None, as_json: bool
) -> None:
    """List the models that the catalog knows.

    SEARCH keeps the models whose name holds it.
    """
    most = math.inf if max_params is None else parse_count(max_params, "--max-params")
    models = catalog_models()
    if family is not None:
        models = of_family(models, family)
    found = [
        model
        for model in models
        if search.casefold() in model.architecture.name.casefold()
        and model.architecture.total_parameters <= most
    ]
    if as_json:
        json.report_list("models", [model.to_json() for model in found])
    else:
        catalog.report_models(found)


def of_family(models: Sequence[CatalogModel], family: str) -> tuple[CatalogModel, ...]:
    """The models of a family; raises UnknownNameError."""
    known = {model.architecture.model_type for model in models}
    if family.casefold() not in known:
        raise UnknownNameError("--family", family, sorted(known))
    return tuple(
        model for model in models if model.architecture.model_type == family.casefold()
    )
