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
    for told in _solution(plan):
        terminal.say(told)
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


TIERS = {
    "T0": "a prior, for which nothing was measured",
    "T1": "the checkpoint's weights",
    "T2": "what was measured of the layers' inputs",
}
"""What each tier of a rank's worth stands on."""


def _solution(plan: Plan) -> Iterator[str]:
    """What the ranks stand on, and what is proven of them."""
    found = plan.solution
    if not found:
        return
    yield f"The worth of ranks is of tier {plan.tier}: {TIERS[plan.tier]}."
    status = str(found["status"]).replace("_", " ")
    yield (
        f"Ranks by {found['solver']}, {status}: loss {_number(found['objective'])}, no "
        f"less than {_number(found['dual_bound'])} within the bytes (gap "
        f"{_number(found['gap'])}); one more GiB would save "
        f"{_number(found['price_of_gib'])} of it."
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


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
