"""The catalog's models and cards on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.catalog import CatalogCard, CatalogModel
from memplan.reporters import terminal
from memplan.units import format_bytes, format_count


def report_models(models: Sequence[CatalogModel]) -> None:
    """Prints a line for each model; the family is what configs call model_type."""
    terminal.table(
        ("model", "family", "parameters", "layers", "hidden", "vocabulary"),
        [_model_row(model) for model in models],
        right=("parameters", "layers", "hidden", "vocabulary"),
    )
    terminal.say(f"\nModels: {len(models)}.")


def report_cards(cards: Sequence[CatalogCard]) -> None:
    """Prints a line for each card."""
    terminal.table(
        ("card", "capacity", "context", "capability", "GB/s", "TFLOP/s"),
        [_card_row(card) for card in cards],
        right=("capacity", "context", "capability", "GB/s", "TFLOP/s"),
    )
    terminal.say(
        f"\nCards: {len(cards)}. Capacity is the total that torch sees, TFLOP/s the "
        "dense bf16 rate; a blank is unknown."
    )
    unknown = [card.card["name"] for card in cards if card.gpu is None]
    if unknown:
        terminal.say(f"Give a size instead of: {', '.join(unknown)}.")


def _model_row(model: CatalogModel) -> tuple[str, ...]:
    architecture = model.architecture
    return (
        architecture.name,
        architecture.model_type,
        format_count(architecture.total_parameters),
        terminal.plus(architecture.layers_by_stack.values()),
        str(architecture.hidden_size),
        _number(architecture.vocab_size or None),
    )


def _card_row(card: CatalogCard) -> tuple[str, ...]:
    gpu = card.gpu
    return (
        card.card["name"],
        "" if gpu is None else format_bytes(gpu.capacity_bytes),
        "" if gpu is None else format_bytes(gpu.context_bytes),
        card.card["compute_capability"],
        _number(card.card["mem_bandwidth_gbps"]),
        _number(card.card["bf16_dense_tflops"]),
    )


def _number(value: float | None) -> str:
    """A number without an exponent or needless digits; unknown is blank."""
    return "" if value is None else f"{value:.10g}"
