"""`memplan gpus`: the cards that the catalog knows."""

from __future__ import annotations

import click

from memplan.commands.options import json_option
from memplan.gpu import CatalogCard, catalog_cards
from memplan.reporters import json, terminal
from memplan.units import format_bytes, parse_size


@click.command()
@click.argument("search", required=False, default="")
@click.option("--min-memory", help="Only cards of at least this size, such as 24GB.")
@json_option
def command(search: str, min_memory: str | None, as_json: bool) -> None:
    """List the cards that the catalog knows.

    SEARCH keeps the cards whose name or alias holds it. A blank is unknown; a card
    without a capacity is planned for by giving a size.
    """
    smallest = 0 if min_memory is None else parse_size(min_memory, "--min-memory")
    found = [
        card
        for card in catalog_cards()
        if card.matches(search) and (card.capacity_bytes or 0) >= smallest
    ]
    if as_json:
        json.report_list("gpus", [card.to_json() for card in found])
    else:
        _report(found)


def _report(cards: list[CatalogCard]) -> None:
    terminal.table(
        ("card", "capacity", "context", "capability", "GB/s", "bf16 TFLOP/s"),
        [
            (
                card.name,
                format_bytes(card.capacity_bytes) if card.capacity_bytes else "",
                format_bytes(card.context_bytes) if card.context_bytes else "",
                card.compute_capability,
                _number(card.memory_bandwidth_gbps),
                _number(card.bf16_dense_tflops),
            )
            for card in cards
        ],
        right=("capacity", "context", "capability", "GB/s", "bf16 TFLOP/s"),
        caption=f"{len(cards)} cards; capacity is the total as torch sees it",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
