"""The search of a recipe, over a closed form whose answers are known."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from closed_form import estimate_of, footprint

from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.planner import choices
from memplan.planner.choices import Floors, recipes, with_keys
from memplan.planner.modules import adapted_linears, group
from memplan.planner.ranks import QUALITY_TOLERANCE, RankSearch, lost_share, menu
from memplan.planner.search import Found, Search, front, rated
from memplan.planner.value import priors
from memplan.recipe import Recipe

LLAMA = inspect("meta-llama/Llama-2-7b-hf")
SMALL = inspect("Qwen/Qwen2.5-0.5B")
CARD = find_gpu("RTX 3060")
GIB = 2**30


def search(**keys: Any) -> Search:
    found = {
        "architecture": SMALL,
        "gpu": CARD,
        "base": Recipe(),
        "given": frozenset(),
        "floors": Floors(effective_batch=4),
    } | keys
    estimate = estimate_of(found["architecture"], found["gpu"])
    return Search(**{"estimate": estimate, "verify": estimate} | found)


def within(found: Found, one: Search) -> bool:
    reserved = footprint(one.architecture, found.recipe, one.gpu).life_peak
    budget = one.gpu.budget_bytes - one.floors.margin_bytes
    return reserved.reserved_bytes <= budget


@pytest.mark.parametrize("prefer", choices.PREFERENCES)
@pytest.mark.parametrize("architecture", [SMALL, LLAMA], ids=["0.5b", "7b"])
def test_what_is_found_fits_within_the_margin_and_the_floors(
    prefer: str, architecture: Any
) -> None:
    floors = Floors(sequence_length=1024, effective_batch=8, margin_bytes=GIB // 4)
    one = search(architecture=architecture, floors=floors, prefer=prefer)

    found = one.run()

    assert within(found, one)
    assert found.recipe.sequence_length >= 1024
    assert found.recipe.batch_size * found.recipe.accumulation == 8
    assert min(found.ranked.ranks.values()) >= floors.rank


def test_weights_are_quantised_only_where_they_have_to_be() -> None:
    assert search().run().recipe.quantization == "none"
    large = search(architecture=LLAMA).run().recipe
    assert large.quantization == "nf4-double"


def test_length_prefers_the_longest_that_fits() -> None:
    one = search(architecture=LLAMA, prefer="length")

    longest = one.run().recipe.sequence_length

    assert longest == LLAMA.max_positions
    tighter = search(architecture=LLAMA, prefer="length", gpu=find_gpu("6GB")).run()
    assert tighter.recipe.sequence_length <= longest


def test_speed_is_never_slower_than_quality() -> None:
    def rate(prefer: str) -> float:
        return search(architecture=LLAMA, prefer=prefer).run().candidate.cost.seconds

    assert rate("speed") <= rate("quality") * 1.001


def test_keys_that_were_given_are_kept() -> None:
    base = Recipe(optimizer="adamw-8bit", checkpointing="full", rank=8, batch_size=2)
    given = {"optimizer", "checkpointing", "rank", "batch_size"}

    recipe = search(base=base, given=given).run().recipe

    assert (recipe.optimizer, recipe.checkpointing) == ("adamw-8bit", "full")
    assert (recipe.batch_size, recipe.accumulation) == (2, 2)
    assert (recipe.rank, recipe.rank_pattern) == (8, {})


def test_nothing_that_fits_is_refused_with_what_is_missing() -> None:
    one = search(architecture=LLAMA, gpu=find_gpu("3.6GB"))

    with pytest.raises(InputError, match="lacks"):
        one.run()
    smallest = footprint(LLAMA, one.smallest(), one.gpu)
    assert smallest.life_peak.reserved_bytes > one.gpu.budget_bytes


def test_verification_has_the_last_word() -> None:
    """It finds a GiB more than the estimate, and the plan still fits."""
    asked = []

    def verify(recipe: Recipe) -> Footprint:
        asked.append(recipe)
        found = footprint(LLAMA, recipe, CARD)
        worse = [
            dataclasses.replace(m, reserved_bytes=m.reserved_bytes + GIB)
            for m in found.moments
        ]
        return dataclasses.replace(found, moments=tuple(worse))

    found = search(architecture=LLAMA, verify=verify).run()

    reserved = verify(found.recipe).life_peak.reserved_bytes
    assert reserved <= CARD.budget_bytes
    assert found.candidate.footprint.life_peak.reserved_bytes == reserved


def more_by(num_bytes: int) -> Callable[[Recipe], Footprint]:
    """The closed form with so many bytes more, unless all is checkpointed."""

    def read(recipe: Recipe) -> Footprint:
        found = footprint(LLAMA, recipe, CARD)
        whole = recipe.checkpointing == "full" and recipe.every_n_layers == 1
        worse = [
            dataclasses.replace(
                m, reserved_bytes=m.reserved_bytes + (0 if whole else num_bytes)
            )
            for m in found.moments
        ]
        return dataclasses.replace(found, moments=tuple(worse))

    return read


def test_what_does_not_pass_the_screen_is_not_verified() -> None:
    read, verified = more_by(7 * GIB), []

    def verify(recipe: Recipe) -> Footprint:
        verified.append(recipe)
        return read(recipe)

    found = search(architecture=LLAMA, verify=verify, screen=read).run()

    assert verified == [found.recipe]
    assert search(architecture=LLAMA, verify=read).run().recipe == found.recipe


def test_screen_alone_refuses_nothing() -> None:
    """What it has against every recipe, the verification of the smallest overrules."""

    def screen(recipe: Recipe) -> Footprint:
        return dataclasses.replace(
            footprint(LLAMA, recipe, CARD), failed_moment="1.forward", missing_bytes=GIB
        )

    one = search(architecture=LLAMA, screen=screen)

    assert within(one.run(), one)


def test_failed_verification_leads_to_another_recipe_of_the_same_quality() -> None:
    """Without checkpointing all is larger than estimated: its ranks are not cut."""
    estimate = estimate_of(LLAMA, CARD)
    plain = search(architecture=LLAMA).run()

    def verify(recipe: Recipe) -> Footprint:
        found = footprint(LLAMA, recipe, CARD)
        more = 0 if recipe.checkpointing == "full" else 7 * GIB
        worse = [
            dataclasses.replace(m, reserved_bytes=m.reserved_bytes + more)
            for m in found.moments
        ]
        return dataclasses.replace(found, moments=tuple(worse))

    found = search(architecture=LLAMA, estimate=estimate, verify=verify).run()

    assert plain.recipe.checkpointing == "none"
    assert found.recipe.checkpointing == "full"
    lost = found.candidate.lost_share - plain.candidate.lost_share
    assert lost <= QUALITY_TOLERANCE


def test_estimate_that_thinks_too_much_does_not_refuse_alone() -> None:
    """The smallest recipe is verified where the estimate is not far from the budget."""
    verified = estimate_of(LLAMA, CARD)
    smallest = verified(search(architecture=LLAMA).smallest()).life_peak.reserved_bytes
    tight = find_gpu("12GB", reserve_bytes=0)
    spare = tight.budget_bytes - smallest - GIB // 64
    card = dataclasses.replace(tight, reserve_bytes=spare)

    def estimate(recipe: Recipe) -> Footprint:
        found = verified(recipe)
        worse = [
            dataclasses.replace(m, reserved_bytes=int(1.03 * m.reserved_bytes))
            for m in found.moments
        ]
        return dataclasses.replace(found, moments=tuple(worse))

    one = search(architecture=LLAMA, gpu=card, estimate=estimate, verify=verified)
    found = one.run()

    assert found.candidate.footprint.life_peak.reserved_bytes <= card.budget_bytes
    assert found.recipe == one.smallest()


def test_full_fine_tuning_has_no_ranks() -> None:
    one = search(base=Recipe(method="full"), given={"method"})

    found = one.run()

    assert found.ranked is None
    assert within(found, one)


def test_ranks_that_were_given_by_module_are_settled() -> None:
    pattern = {"q_proj": 2}
    one = search(base=Recipe(rank=8, rank_pattern=pattern), given={"rank_pattern"})

    found = one.run()

    assert found.ranked is None
    assert found.recipe.rank_pattern == pattern


def test_front_holds_what_nothing_beats() -> None:
    found = search(architecture=LLAMA).run()

    kept = front(found.considered)

    assert 1 <= len(kept) < len(found.considered)
    for one, other in itertools.permutations(kept, 2):
        assert not (
            one.reserved_bytes <= other.reserved_bytes
            and one.lost_share <= other.lost_share
            and one.seconds_per_token < other.seconds_per_token
        )


def test_preset_keys_follow_the_quantisation_unless_given() -> None:
    base = Recipe(trainer="trl")

    assert with_keys(base, (), {"quantization": "nf4"}).adapter_dtype == "bfloat16"
    kept = with_keys(base, {"adapter_dtype"}, {"quantization": "nf4"})
    assert kept.adapter_dtype == "float32"


def test_every_combination_is_a_recipe_of_the_effective_batch() -> None:
    found = [*recipes(Recipe(), (), Floors(effective_batch=8), "none", 512)]

    assert len(found) == 2 * 3 * 5 * 4
    assert {one.batch_size * one.accumulation for one in found} == {8}
    assert len({str(one.to_json()) for one in found}) == len(found)


def test_card_of_unknown_rates_takes_another_s() -> None:
    assert rated(find_gpu("12GB")).bf16_dense_tflops == CARD.bf16_dense_tflops
    assert rated(CARD) is CARD


def rank_search(budget_bytes: int, granularity: str = "by-type") -> RankSearch:
    recipe = Recipe(quantization="nf4-double", checkpointing="full")
    groups = group(adapted_linears(LLAMA, recipe), granularity)
    return RankSearch(
        recipe=recipe,
        groups=groups,
        estimate=estimate_of(LLAMA, CARD),
        budget_bytes=budget_bytes,
        ranks=menu(groups, choices.RANKS, 4),
    )


@pytest.mark.parametrize("granularity", ["uniform", "by-type", "by-layer"])
def test_ranks_take_what_there_is_and_no_byte_more(granularity: str) -> None:
    smallest = footprint(LLAMA, rank_search(0)._with({}), CARD).life_peak.reserved_bytes
    for extra in (0, GIB // 8, GIB // 2):
        ranked = rank_search(smallest + extra, granularity).run()

        assert ranked.footprint.life_peak.reserved_bytes <= smallest + extra
        if not extra:
            assert set(ranked.ranks.values()) == {4}
    assert rank_search(smallest - 1).run() is None


def test_more_budget_loses_no_more() -> None:
    smallest = footprint(LLAMA, rank_search(0)._with({}), CARD).life_peak.reserved_bytes
    linears = adapted_linears(LLAMA, Recipe())

    lost = [
        lost_share(linears, rank_search(smallest + step * GIB // 4).run().ranks)
        for step in range(5)
    ]

    assert all(b <= a + 0.1 for a, b in itertools.pairwise(lost))


def test_slack_memory_stops_at_the_knee() -> None:
    ranked = rank_search(80 * GIB).run()

    assert ranked.slack
    assert max(ranked.ranks.values()) <= 128
    linears = adapted_linears(LLAMA, Recipe())
    most = lost_share(linears, dict.fromkeys(linears, 128))
    assert most <= lost_share(linears, ranked.ranks) <= most + QUALITY_TOLERANCE
    assert sum(ranked.ranks.values()) < 128 * len(linears)


def test_lost_share_is_by_the_prior_that_says_most() -> None:
    linears = adapted_linears(LLAMA, Recipe())
    ranks = {path: 32 if "self_attn" in path else 4 for path in linears}

    found = lost_share(linears, ranks)

    by_prior = []
    for name in priors.names():
        prior = priors.find(name)
        whole = sum(prior.weight(one) for one in linears.values())
        lost = sum(prior.loss(one, ranks[path]) for path, one in linears.items())
        by_prior.append(lost / whole)
    assert found == max(by_prior)
    assert lost_share(linears, dict.fromkeys(linears, 8)) == 0.5


def test_length_is_the_longest_that_any_combination_fits() -> None:
    """One step more fits no combination at the smallest ranks."""
    one = search(architecture=LLAMA, prefer="length", gpu=find_gpu("4GB"))

    found = one.run()

    length = found.recipe.sequence_length
    assert one.floors.sequence_length < length < LLAMA.max_positions
    assert length % choices.LENGTH_STEP == 0
    budget = one.gpu.budget_bytes
    for quantization in choices.QUANTIZATIONS:
        longer = length + choices.LENGTH_STEP
        for recipe in recipes(one.base, (), one.floors, quantization, longer):
            smallest = dataclasses.replace(recipe, rank=4)
            needed = footprint(LLAMA, smallest, one.gpu).life_peak.reserved_bytes
            assert needed > budget


def test_length_that_fails_is_shortened_until_it_is_upheld() -> None:
    def verify(recipe: Recipe) -> Footprint:
        found = footprint(LLAMA, recipe, CARD)
        more = recipe.sequence_length * 2**17
        worse = [
            dataclasses.replace(m, reserved_bytes=m.reserved_bytes + more)
            for m in found.moments
        ]
        return dataclasses.replace(found, moments=tuple(worse))

    gpu = find_gpu("4GB")
    plain = search(architecture=LLAMA, prefer="length", gpu=gpu).run()
    found = search(architecture=LLAMA, prefer="length", gpu=gpu, verify=verify).run()

    assert 512 <= found.recipe.sequence_length < plain.recipe.sequence_length
    reserved = verify(found.recipe).life_peak.reserved_bytes
    assert reserved <= gpu.budget_bytes
