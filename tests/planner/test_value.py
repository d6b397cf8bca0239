"""What a rank is worth: the named priors, all of them at once, and what data says."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest

from memplan.architecture import Linear
from memplan.catalog import inspect
from memplan.errors import UnknownNameError
from memplan.planner.modules import Group, adapted_linears, group
from memplan.planner.solver import Problem, Status, solve_lagrangian
from memplan.planner.value import explained_variance, priors, quantization_error
from memplan.planner.value.robust import solve_robust
from memplan.recipe import Recipe

RANKS = (2, 4, 8, 16)
LLAMA = inspect("meta-llama/Llama-2-7b-hf")
GROUPS = group(adapted_linears(LLAMA, Recipe()), "by-type")


def linear(kind: str) -> Linear:
    return Linear(path="x", in_features=64, out_features=96, bias=False, kind=kind)


def losses(name: str, groups: tuple[Group, ...] = GROUPS) -> np.ndarray:
    prior = priors.find(name)
    return np.array(
        [
            [sum(prior.loss(one, rank) for one in held.linears) for rank in RANKS]
            for held in groups
        ]
    )


def posed(name: str, budget_rank: float = 8) -> Problem:
    sizes = [16 * one.parameters_per_rank for one in GROUPS]
    return Problem(
        costs=losses(name),
        num_bytes=np.array([[[rank * size for rank in RANKS] for size in sizes]]),
        free_bytes=np.array([int(budget_rank * sum(sizes))]),
    )


def ranks_of(name: str) -> dict[str, int]:
    choices = solve_lagrangian(posed(name)).choices
    assert choices is not None
    return {
        held.name.rpartition(".")[2]: RANKS[choice]
        for held, choice in zip(GROUPS, choices, strict=True)
    }


@pytest.mark.parametrize("name", priors.names())
def test_loss_falls_ever_slower_with_the_rank(name: str) -> None:
    prior = priors.find(name)
    for kind in ("attention", "mlp", "other"):
        at = [prior.loss(linear(kind), rank) for rank in range(65)]

        falls = -np.diff(at)
        assert (falls > 0).all()
        assert (np.diff(falls) < 0).all()
        assert at[8] == at[0] / 2


def test_seed_s_ratio_is_that_of_its_table() -> None:
    """Table 3, LLaMA-7B: 62.0, 61.2 and 61.8 for 4 and 3 linears of a block."""
    sensitive = priors.find("attention-sensitive")

    ratio = sensitive.weight(linear("attention")) / sensitive.weight(linear("mlp"))

    assert ratio == pytest.approx((0.8 / 4) / (0.2 / 3))


def test_per_parameter_gives_equal_ranks() -> None:
    assert set(ranks_of("per-parameter").values()) == {8}


def test_opposite_opinions_give_opposite_ranks() -> None:
    attention_first, mlp_first = ranks_of("attention-sensitive"), ranks_of("mlp-first")

    assert attention_first["q_proj"] > attention_first["down_proj"]
    assert attention_first["down_proj"] < mlp_first["down_proj"]
    assert attention_first["q_proj"] > mlp_first["q_proj"]


def test_unknown_prior_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="attention-sensitive"):
        priors.find("attention-sensitiv")


@pytest.mark.parametrize("name", priors.names())
def test_every_prior_says_what_it_stands_on(name: str) -> None:
    prior = priors.find(name)

    assert prior.summary
    assert all(sentence.endswith(".") for sentence in prior.evidence)


@pytest.mark.parametrize("exact", [False, True])
def test_robust_ranks_regret_least(exact: bool) -> None:
    by_prior = {name: losses(name) for name in priors.names()}

    robust = solve_robust(posed("uniform"), by_prior, exact=exact)

    assert robust.solution.choices is not None
    assert max(robust.regrets.values()) == pytest.approx(robust.solution.objective)
    for name in by_prior:
        alone = solve_lagrangian(posed(name)).choices
        assert robust.solution.objective <= largest_regret(alone, by_prior) + 1e-9
    assert robust.solution.dual_bound <= robust.solution.objective + 1e-9


def test_robust_s_exact_answer_is_brute_force_s() -> None:

    by_prior = {name: losses(name) for name in priors.names()}
    problem = posed("uniform")
    every = map(np.array, itertools.product(range(len(RANKS)), repeat=len(GROUPS)))
    best = min(largest_regret(c, by_prior) for c in every if problem.fits(c))

    found = solve_robust(problem, by_prior, exact=True).solution

    assert found.objective == pytest.approx(best, rel=1e-3)
    assert found.status in (Status.OPTIMAL, Status.WITHIN_GAP)


@functools.cache
def best_and_worst(name: str) -> tuple[float, float]:
    return solve_lagrangian(posed(name)).objective, losses(name)[:, 0].sum()


def largest_regret(choices: object, by_prior: dict[str, np.ndarray]) -> float:
    """By the definition: shares of what the budget can gain, the largest of them."""
    taken = np.array(choices)
    rows = np.arange(len(taken))
    regrets = []
    for name, cost in by_prior.items():
        best, worst = best_and_worst(name)
        regrets.append((cost[rows, taken].sum() - best) / (worst - best))
    return max(regrets)


def test_robust_of_what_cannot_fit_is_infeasible() -> None:
    by_prior = {name: losses(name) for name in priors.names()}

    robust = solve_robust(posed("uniform", budget_rank=1), by_prior)

    assert robust.solution.status is Status.INFEASIBLE
    assert math.isinf(robust.solution.objective)
    assert not robust.regrets


def test_explained_variance_loses_what_is_left_out() -> None:
    spectrum = [0.5, 0.25, 0.125, 0.125]

    assert [explained_variance.loss(spectrum, r) for r in (0, 1, 2, 4, 9)] == [
        1.0,
        0.5,
        0.25,
        0.0,
        0.0,
    ]
    spectra = {"a": spectrum, "b": [1.0]}
    assert explained_variance.losses(spectra, [["a", "b"]], [1, 2]) == [[0.5, 0.25]]


def test_spared_modules_cost_nothing_and_are_named_once() -> None:
    found = quantization_error.losses({"a": 2.0, "b": 3.0}, [["a", "b"]])

    assert found == [[5.0, 0.0]]
    spared = quantization_error.with_spared(Recipe(), ["lm_head", "a"])
    assert spared.unquantized_modules == ("lm_head", "a")
