"""`memplan models`: the models that the catalog knows."""

from __future__ import annotations

import click

from memplan.commands.options import json_option
from memplan.errors import InputError
from memplan.model_source import CatalogModel, catalog_models
from memplan.reporters import json, terminal
from memplan.units import format_count


@click.command()
@click.argument("search", required=False, default="")
@click.option("--family", help="Only models of this family (model_type).")
@click.option("--max-params", help="Only models of at most so many parameters: 8B.")
@json_option
def command(
    search: str, family: str | None, max_params: str | None, as_json: bool
) -> None:
    """List the models that the catalog knows.

    SEARCH keeps the models whose name holds it.
    """
    largest = None if max_params is None else _parse_count(max_params)
    found = [
        model
        for model in catalog_models()
        if search.casefold() in model.name.casefold()
        and family in (None, model.model_type)
        and (largest is None or model.total_parameters <= largest)
    ]
    if as_json:
        json.report_list("models", [model.to_json() for model in found])
    else:
        _report(found)


def _report(models: list[CatalogModel]) -> None:
    terminal.table(
        ("model", "family", "parameters", "layers", "hidden", "vocabulary"),
        [
            (
                model.name,
                model.model_type,
                format_count(model.total_parameters),
                str(model.num_layers),
                str(model.hidden_size),
                str(model.vocab_size),
            )
            for model in models
        ],
        right=("parameters", "layers", "hidden", "vocabulary"),
        caption=f"{len(models)} models",
    )


def _parse_count(text: str) -> float:
    """The number that `8B`, `350M` or a plain count stands for."""
    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
    number, factor = text.strip(), 1.0
    if number and number[-1].lower() in scale:
        number, factor = number[:-1], scale[number[-1].lower()]
    try:
        count = float(number) * factor
    except ValueError:
        count = 0.0
    if not 0 < count < float("inf"):
        raise InputError(
            "--max-params", text, "is not a count", "write it as 8B, 350M or 7000000000"
        )
    return count
