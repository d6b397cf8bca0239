"""`plan`: the search's answer as a `Plan`, with its reasons and what was rejected."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memplan.architecture import Architecture
from memplan.batching import Batch, batches, fewer_steps, lengths_json
from memplan.gpu import Gpu
from memplan.lengths import Lengths
from memplan.plan import Plan, Rejected
from memplan.planner.choices import QUANTIZATIONS, Floors
from memplan.planner.means import Means
from memplan.planner.ranks import EXPLAINED_VARIANCE, QUALITY_TOLERANCE, ROBUST
from memplan.planner.search import RATES_OF, Candidate, Found, Search, front
from memplan.planner.value import priors
from memplan.planner.value.explained_variance import EVIDENCE
from memplan.planner.why_not import Change, Question, rejected
from memplan.recipe import Recipe
from memplan.units import format_bytes
from memplan.values import Values


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
    values: Values | None = None
    """What was measured of the model's layers."""
    spares: bool = False
    """Whether memory that ranks leave is spent on layers in 16 bits."""
    lengths: Lengths | None = None
    """How long the samples are, where that is known; the longest is settled."""


def plan(architecture: Architecture, gpu: Gpu, asked: Asked, means: Means) -> Plan:
    """The plan; raises InputError where nothing fits."""
    found = search_of(architecture, gpu, asked, means).run()
    made: tuple[Batch, ...] = ()
    if asked.lengths is not None:
        made = batches(architecture, found.recipe, gpu, asked.lengths)
    question = Question(
        architecture=architecture,
        recipe=found.recipe,
        gpu=gpu,
        estimate=means.estimate,
    )
    ranked = found.ranked
    return Plan(
        model=architecture.name,
        recipe=found.recipe,
        gpu=gpu,
        footprint=found.candidate.footprint,
        parameters=means.parameters(found.recipe),
        verified_by="estimate" if means.verify is None else "simulation",
        prefer=asked.prefer,
        prior=asked.prior,
        tier="T2" if asked.prior == EXPLAINED_VARIANCE else "T0",
        solution={} if ranked is None else ranked.solution.to_json(),
        regrets={} if ranked is None else ranked.regrets,
        reasons=(*_length_reasons(asked, made), *_reasons(asked, found, question)),
        alternatives=tuple(_alternatives(found, asked.alternatives)),
        rejected=tuple(map(_rejected, rejected(question.single_changes))),
        lengths={} if asked.lengths is None else lengths_json(asked.lengths, made),
        notes=tuple(dict.fromkeys(_notes(gpu, found, asked))),
    )


def search_of(
    architecture: Architecture, gpu: Gpu, asked: Asked, means: Means
) -> Search:
    """The search for what is asked, by those means."""
    return Search(
        architecture=architecture,
        gpu=gpu,
        base=asked.base,
        given=asked.given,
        estimate=means.estimate,
        screen=None if means.verify is None else means.screen,
        verify=means.verify or means.screen,
        floors=asked.floors,
        prefer=asked.prefer,
        granularity=asked.granularity,
        prior=asked.prior,
        values=asked.values,
        spares=asked.spares,
    )


def _length_reasons(asked: Asked, made: Sequence[Batch]) -> Iterator[str]:
    """What the longest batch decides, and what other ways to make batches change."""
    lengths = asked.lengths
    if lengths is None:
        return
    by_name = {one.name: one for one in made}
    longest = by_name["longest"]
    yield (
        f"The longest of {lengths.num_samples:,} samples decides the peak: "
        f"{lengths.longest:,} tokens; half have no more than "
        f"{lengths.percentile(0.5):,}, and 99 % no more than "
        f"{lengths.percentile(0.99):,}, which would take "
        f"{_reserved(by_name['p99'])} instead of {_reserved(longest)} by the estimate."
    )
    saved = fewer_steps(longest.recipe, lengths)
    yield (
        f"Packing would make every batch as large as that one, "
        f"{_reserved(by_name['packed'])}, and save {saved:.0%} of the steps; without "
        f"padding the longest batch would take {_reserved(by_name['padding-free'])}, "
        f"and one of mean length {_reserved(by_name['padding-free mean'])}."
    )


def _reserved(batch: Batch) -> str:
    if batch.footprint is None:
        return "what cannot run"
    return format_bytes(batch.footprint.life_peak.reserved_bytes)


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
    yield from _bit_reasons(asked, found)
    for change in rejected(question.single_changes):
        yield (
            f"{_told(change.changes)} would be {change.speed:.2f} times as fast, and "
            f"lacks {format_bytes(change.missing_bytes)}."
        )


def _bit_reasons(asked: Asked, found: Found) -> Iterator[str]:
    """How many layers were spared, and how much of the error with that."""
    values, recipe = asked.values, found.recipe
    if not asked.spares or values is None or recipe.quantization == "none":
        return
    spared = [path for path in recipe.unquantized_modules if path in values.errors]
    whole = sum(values.errors.values())
    share = sum(values.errors[path] for path in spared) / whole if whole else 0.0
    yield (
        f"{len(spared)} of {len(values.errors)} layers stay unquantised, which spares "
        f"{share:.0%} of what {values.quantization} is off by."
    )


def _rank_reasons(asked: Asked, found: Found) -> Iterator[str]:
    ranked = found.ranked
    if ranked is None:
        return
    if ranked.slack and "rank" not in asked.given:
        yield (
            "Rank is not the bottleneck: every module could have the largest, and the "
            f"ranks stop {QUALITY_TOLERANCE:.0%} of the adapters' worth short of it."
        )
    if asked.prior == ROBUST and ranked.regrets:
        told = ", ".join(
            f"{name} {share:.0%}" for name, share in ranked.regrets.items()
        )
        yield (
            "Ranks are those that no prior regrets much; of what the budget can gain, "
            f"each forgoes: {told}."
        )
    elif asked.prior == EXPLAINED_VARIANCE and asked.values is not None:
        yield (
            "Ranks are by how much of the layers' inputs they explain, byte for byte: "
            f"{asked.values.basis}."
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
    if asked.prior == EXPLAINED_VARIANCE:
        yield EVIDENCE
    elif asked.prior != ROBUST:
        yield from priors.find(asked.prior).evidence


def _told(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items())
