"""Ranks by module, and the patterns that PEFT reads them from."""

from __future__ import annotations

import re

import pytest

from memplan.catalog import inspect
from memplan.errors import UnknownNameError
from memplan.planner.modules import (
    GRANULARITIES,
    adapted_linears,
    alphas_of,
    group,
    pattern_of,
    ranks_of,
    with_ranks,
)
from memplan.recipe import Recipe

LLAMA = inspect("meta-llama/Llama-2-7b-hf")


def test_all_linear_is_everything_but_the_head() -> None:
    linears = adapted_linears(LLAMA, Recipe())

    assert len(linears) == 7 * 32
    assert sum(one.in_features + one.out_features for one in linears.values()) * 64 == (
        159_907_840
    )


def test_names_are_ends_of_paths() -> None:
    linears = adapted_linears(LLAMA, Recipe(targets=("q_proj", "v_proj")))

    assert len(linears) == 64
    with pytest.raises(UnknownNameError, match="q_prj"):
        adapted_linears(LLAMA, Recipe(targets=("q_prj",)))


@pytest.mark.parametrize(
    ("granularity", "count"), list(zip(GRANULARITIES, (1, 7, 32, 224), strict=True))
)
def test_groups_hold_every_module_once(granularity: str, count: int) -> None:
    linears = adapted_linears(LLAMA, Recipe())

    groups = group(linears, granularity)

    assert len(groups) == count
    held = [path for one in groups for path in one.paths]
    assert sorted(held) == sorted(linears)
    assert sum(one.parameters_per_rank for one in groups) == 2_498_560


def test_patterns_give_every_module_its_rank_and_scale() -> None:
    linears = adapted_linears(LLAMA, Recipe())
    ranks = {path: 4 * (1 + index % 3) for index, path in enumerate(linears)}

    recipe = with_ranks(Recipe(rank=16), ranks)

    assert ranks_of(recipe, linears) == ranks
    assert {
        alphas_of(recipe, linears)[path] / rank for path, rank in ranks.items()
    } == {2.0}


def test_scale_of_rslora_is_kept_by_the_root_of_the_rank() -> None:
    linears = adapted_linears(LLAMA, Recipe(targets="attention"))
    ranks = {path: 4 if "q_proj" in path else 16 for path in linears}

    recipe = with_ranks(Recipe(method="rslora", targets="attention"), ranks)

    alphas = alphas_of(recipe, linears)
    assert {alphas[path] / rank**0.5 for path, rank in ranks.items()} == {8.0}


def test_a_rank_for_all_needs_no_pattern() -> None:
    linears = adapted_linears(LLAMA, Recipe())

    recipe = with_ranks(Recipe(rank=16), dict.fromkeys(linears, 8))

    assert (recipe.rank, recipe.alpha, recipe.rank_pattern) == (8, 16.0, {})


def test_keys_are_whole_paths_that_match_no_other() -> None:
    ranks = {"model.layers.1.mlp.up_proj": 4, "model.layers.11.mlp.up_proj": 8}

    pattern = pattern_of(ranks)

    assert pattern == {
        r"model\.layers\.1\.mlp\.up_proj": 4,
        r"model\.layers\.11\.mlp\.up_proj": 8,
    }
    assert not re.match(r"(.*\.)?(model\.layers\.1\.mlp\.up_proj)$", [*ranks][1])


def test_layers_of_a_rank_share_a_key() -> None:
    ranks = {f"model.layers.{i}.mlp.up_proj": 4 for i in range(3)}

    assert pattern_of(ranks) == {r"model\.layers\.(0|1|2)\.mlp\.up_proj": 4}
    assert pattern_of({"lm_head": 2}) == {"lm_head": 2}
