"""`plan`: the search's answer as a `Plan`, with its reasons and what was rejected."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memplan import methods
from memplan.architecture import Architecture
from memplan.gpu import Gpu
from memplan.plan import Plan, Rejected
from memplan.planner.choices import QUANTIZATIONS, Estimate, Floors
from memplan.planner.modules import adapted_linears
from memplan.planner.ranks import KNEE_TOLERANCE, ROBUST
from memplan.planner.search import RATES_OF, Candidate, Found, Search, front
from memplan.planner.value import priors
from memplan.planner.why_not import Change, Question, rejected
from memplan.recipe import Recipe
from memplan.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a plan is asked to be."""

    base: Recipe
    given: Collection[str]
    """Keys of the recipe that are settled."""
    floors: Floors
    prefer: str
    granularity: str
    prior: str
    alternatives: int = 0
    """How many other recipes are shown."""


def plan(
    architecture: Architecture,
    gpu: Gpu,
    asked: Asked,
    estimate: Estimate,
    verify: Estimate | None,
) -> Plan:
    """The plan; `verify` has the last word, and the estimate where it is None.

    Raises InputError where nothing fits.
    """
    search = Search(
        architecture=architecture,
        gpu=gpu,
        base=asked.base,
        given=asked.given,
        estimate=estimate,
        verify=verify or estimate,
        floors=asked.floors,
        prefer=asked.prefer,
        granularity=asked.granularity,
        prior=asked.prior,
    )
    found = search.run()
    question = Question(
        architecture=architecture, recipe=found.recipe, gpu=gpu, estimate=estimate
    )
    ranked = found.ranked
    return Plan(
        model=architecture.name,
        recipe=found.recipe,
        gpu=gpu,
        footprint=found.candidate.footprint,
        parameters={
            "total": architecture.total_parameters,
            "trainable": trained_parameters(architecture, found.recipe),
        },
        verified_by="estimate" if verify is None else "simulation",
        prefer=asked.prefer,
        prior=asked.prior,
        tier="T0",
        solution={} if ranked is None else ranked.solution.to_json(),
        regrets={} if ranked is None else ranked.regrets,
        reasons=tuple(_reasons(asked, found, question)),
        alternatives=tuple(_alternatives(found, asked.alternatives)),
        rejected=tuple(map(_rejected, rejected(question.single_changes))),
        notes=tuple(dict.fromkeys(_notes(gpu, found, asked))),
    )


def trained_parameters(architecture: Architecture, recipe: Recipe) -> int:
    """The parameters that a recipe trains."""
    if recipe.method == "full":
        return architecture.total_parameters
    method = methods.find(recipe.method)
    return sum(
        method.trainable_parameters(
            linear, methods.rank_at(recipe, path), methods.options_at(recipe, path)
        )
        for path, linear in adapted_linears(architecture, recipe).items()
    )


def _reasons(asked: Asked, found: Found, question: Question) -> Iterator[str]:
    recipe = found.recipe
    if "quantization" not in asked.given and recipe.method != "full":
        first = QUANTIZATIONS[0] == recipe.quantization
        yield (
            "Nothing is quantised, since 16-bit weights fit."
            if first
            else f"The base is {recipe.quantization}, since in 16 bits nothing within "
            "the floors fits."
        )
    fitting = len(found.considered)
    yield (
        f"Of {fitting + found.num_rejected} combinations {fitting} fit; by "
        f"{asked.prefer} first, this one leads."
    )
    yield from _rank_reasons(asked, found)
    for change in rejected(question.single_changes):
        yield (
            f"{_told(change.changes)} would be {change.speed:.2f} times as fast, and "
            f"lacks {format_bytes(change.missing_bytes)}."
        )


def _rank_reasons(asked: Asked, found: Found) -> Iterator[str]:
    ranked = found.ranked
    if ranked is None:
        return
    if ranked.slack and "rank" not in asked.given:
        yield (
            "Rank is not the bottleneck: every module could have the largest, and the "
            f"ranks stop where {KNEE_TOLERANCE:.0%} of the adapters' worth is left."
        )
    if asked.prior == ROBUST and ranked.regrets:
        told = ", ".join(
            f"{name} {share:.0%}" for name, share in ranked.regrets.items()
        )
        yield (
            "Ranks are those that no prior regrets much; of what the budget can gain, "
            f"each forgoes: {told}."
        )
    elif asked.prior != ROBUST:
        summary = priors.find(asked.prior).summary
        yield f"Ranks are by the prior {asked.prior}: {summary}."


def _alternatives(found: Found, count: int) -> Iterator[Mapping[str, Any]]:
    """Members of the front, evenly spread from the smallest to the largest."""
    kept = front(found.considered)
    step = max(1, math.ceil(len(kept) / count)) if count else 1
    chosen = kept[::step] if count else []
    for one in chosen:
        yield {
            "recipe": one.recipe.to_json(),
            "reserved_bytes": one.reserved_bytes,
            "sequence_length": one.recipe.sequence_length,
            "rank": one.recipe.rank,
            "lost_share": one.lost_share,
            "speed": _speed(one, found.candidate),
        }


def _speed(one: Candidate, other: Candidate) -> float:
    return one.cost.ratio_to(other.cost)


def _rejected(change: Change) -> Rejected:
    return Rejected(
        changes=dict(change.changes),
        reason=f"Faster ({change.speed:.2f} times), and does not fit.",
        missing_bytes=change.missing_bytes,
    )


def _notes(gpu: Gpu, found: Found, asked: Asked) -> Iterator[str]:
    yield from gpu.assumptions
    yield from found.candidate.footprint.notes
    yield from found.candidate.cost.assumptions
    if gpu.bf16_dense_tflops is None or gpu.memory_bandwidth_gbps is None:
        yield f"Speeds are compared at the rates of the {RATES_OF}, as none are known."
    if asked.prior != ROBUST:
        yield from priors.find(asked.prior).evidence


def _told(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items())
