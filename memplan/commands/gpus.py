"""`memplan gpus`: the cards that the catalog knows."""

from __future__ import annotations

import click

from memplan.catalog import CatalogCard, catalog_cards
from memplan.commands.options import json_option
from memplan.reporters import catalog, json
from memplan.units import parse_size


@click.command()
@click.argument("search", required=False, default="")
@click.option("--min-memory", help="Only cards of at least this capacity: 24GB, say.")
@json_option
def command(search: str, min_memory: str | None, as_json: bool) -> None:
    """List the cards that the catalog knows.

    SEARCH keeps the cards whose name or alias holds it.
    """
    smallest_bytes = 0 if min_memory is None else parse_size(min_memory, "--min-memory")
    found = [
        card
        for card in catalog_cards()
        if card.matches(search) and _capacity_bytes(card) >= smallest_bytes
    ]
    if as_json:
        json.report_list("gpus", [card.to_json() for card in found])
    else:
        catalog.report_cards(found)


def _capacity_bytes(card: CatalogCard) -> int:
    return 0 if card.gpu is None else card.gpu.capacity_bytes
