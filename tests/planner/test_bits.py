"""Layers that stay unquantised, and ranks by values, where the answers are known."""

from __future__ import annotations

import dataclasses

import pytest
from closed_form import estimate_of

from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.planner import choices
from memplan.planner.bits import BitSearch
from memplan.planner.means import estimate_on
from memplan.planner.modules import adapted_linears, group
from memplan.planner.ranks import EXPLAINED_VARIANCE, RankSearch, menu
from memplan.recipe import Recipe
from memplan.values import Values

LLAMA: Architecture = inspect("meta-llama/Llama-2-7b-hf")
CARD = find_gpu("RTX 3060")
RECIPE = Recipe(quantization="nf4-double", checkpointing="full")
LINEARS = adapted_linears(LLAMA, RECIPE)
GROUPS = group(LINEARS, "by-type")
ESTIMATE = estimate_on(LLAMA, CARD)
QUANTIZED = ESTIMATE(RECIPE).life_peak.reserved_bytes
DOWN, QUERY = "down_proj", "q_proj"


def search(budget_bytes: int, favourite: str) -> BitSearch:
    """Layers of one kind are a thousand times as far off as the others."""
    errors = {path: 1000.0 if path.endswith(favourite) else 1.0 for path in LINEARS}
    return BitSearch(
        recipe=RECIPE,
        groups=GROUPS,
        estimate=ESTIMATE,
        budget_bytes=budget_bytes,
        errors=errors,
    )


@pytest.mark.parametrize("favourite", [DOWN, QUERY])
def test_what_is_most_off_is_spared_first(favourite: str) -> None:
    """A spared weight has 32 bits instead of 4.1: PEFT's preparation casts it."""
    paths = [path for path in LINEARS if path.endswith(favourite)]
    more = sum(LINEARS[path].num_weights for path in paths) * 28 // 8
    budget = int(QUANTIZED + 1.05 * more)

    recipe = search(budget, favourite).run()

    assert {*paths} <= {*recipe.unquantized_modules}
    assert ESTIMATE(recipe).life_peak.reserved_bytes <= budget


def test_no_room_spares_nothing() -> None:
    assert search(QUANTIZED, DOWN).run() == RECIPE


def test_spared_layers_may_be_exported() -> None:
    recipe = search(100 * 2**30, DOWN).run()

    assert {*LINEARS} <= {*recipe.unquantized_modules}


def rank_search(values: Values, budget_bytes: int) -> RankSearch:
    return RankSearch(
        recipe=RECIPE,
        groups=GROUPS,
        estimate=estimate_of(LLAMA, CARD),
        budget_bytes=budget_bytes,
        ranks=menu(GROUPS, choices.RANKS, 4),
        prior=EXPLAINED_VARIANCE,
        values=values,
    )


def values_of(flat: str) -> Values:
    """One direction holds all that a layer sees; of one kind, 128 are alike."""
    spectra = {
        path: (1 / 128,) * 128 if path.endswith(flat) else (1.0,) for path in LINEARS
    }
    return Values(
        model=LLAMA.name,
        basis="made by hand",
        spectra=spectra,
        quantization="nf4-double",
        errors={},
    )


@pytest.mark.parametrize("flat", [DOWN, QUERY])
def test_ranks_go_where_inputs_have_many_directions(flat: str) -> None:
    smallest = estimate_of(LLAMA, CARD)(dataclasses.replace(RECIPE, rank=4))
    budget = smallest.life_peak.reserved_bytes + 2**29

    ranked = rank_search(values_of(flat), budget).run()

    assert ranked is not None
    ranks = {path.rpartition(".")[2]: rank for path, rank in ranked.ranks.items()}
    assert ranks.pop(flat) > 4
    assert set(ranks.values()) == {4}
    assert ranked.footprint.life_peak.reserved_bytes <= budget


def test_layers_without_values_are_refused() -> None:
    values = dataclasses.replace(values_of(DOWN), spectra={})

    with pytest.raises(InputError, match="say nothing"):
        rank_search(values, 100 * 2**30).run()
