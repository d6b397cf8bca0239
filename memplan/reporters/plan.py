"""A plan on a terminal: the recipe, the ranks, the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from memplan.plan import Plan
from memplan.recipe import Recipe
from memplan.reporters import terminal
from memplan.reporters.footprint import report_notes
from memplan.units import format_bytes, format_count

SHOWN = (
    "method",
    "quantization",
    "batch_size",
    "accumulation",
    "sequence_length",
    "checkpointing",
    "every_n_layers",
    "offload",
    "optimizer",
    "loss",
    "adapter_dtype",
    "attention",
)
"""The keys of the recipe that are shown."""


def report(plan: Plan) -> None:
    """Prints a plan."""
    terminal.say(_headline(plan), style="bold")
    rows = [(key, str(getattr(plan.recipe, key))) for key in SHOWN]
    rows += list(_ranks(plan.recipe))
    terminal.table(("key", "value"), rows)
    for reason in plan.reasons:
        terminal.say(reason)
    if plan.alternatives:
        _report_alternatives(plan)
    terminal.say(f"Plan {plan.hash}, verified by {plan.verified_by}.")
    report_notes(plan.notes)


def _headline(plan: Plan) -> str:
    margin = format_bytes(plan.footprint.margin_bytes or 0)
    trained = format_count(plan.parameters["trainable"])
    reserved = format_bytes(plan.footprint.life_peak.reserved_bytes)
    return (
        f"{plan.model} on {plan.gpu.name}: peak {reserved} reserved, {margin} to "
        f"spare, trains {trained} parameters"
    )


def _ranks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The ranks: the one that most modules have, and the patterns of the others."""
    if recipe.method == "full":
        return
    yield "rank", str(recipe.rank)
    for rank, count in sorted(Counter(recipe.rank_pattern.values()).items()):
        keys = [key for key, value in recipe.rank_pattern.items() if value == rank]
        ends = ", ".join(sorted({key.rpartition(r"\.")[2] for key in keys}))
        yield f"rank {rank}", ends if count else ""


def _report_alternatives(plan: Plan) -> None:
    terminal.table(
        ("alternative", "reserved", "tokens", "rank", "speed"),
        [
            (
                f"{one['recipe']['batch_size']} x {one['recipe']['checkpointing']}, "
                f"{one['recipe']['optimizer']}, {one['recipe']['loss']}",
                format_bytes(one["reserved_bytes"]),
                str(one["sequence_length"]),
                str(one["rank"]),
                f"{one['speed']:.2f}",
            )
            for one in plan.alternatives
        ],
        right=("reserved", "tokens", "rank", "speed"),
    )
