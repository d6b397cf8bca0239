"""Operations beside what torch counts, and ratios whose direction is known."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import adapted, architecture, tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.planner.speed import StepCost, step_cost
from memplan.recipe import Recipe

CARD = find_gpu("RTX 4090")
LLAMA = inspect("meta-llama/Llama-2-7b-hf")
BASE = {"sequence_length": 1024, "attention": "flash"}


def cost(**keys: object) -> StepCost:
    return step_cost(LLAMA, Recipe(**BASE | keys), CARD)


def counted(**keys: object) -> int:
    """What torch counts of forward and backward on the CPU, attention aside."""
    model = adapted("llama", attention="eager", dtype="float32", **keys)
    ids = torch.zeros(2, 16, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids, labels=ids).loss.backward()
    by_operator = counter.get_flop_counts()["Global"]
    aside = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    return sum(count for op, count in by_operator.items() if op not in aside)


@pytest.mark.parametrize("keys", [{}, {"checkpointing": "full"}, {"method": "full"}])
def test_products_are_those_that_torch_counts(keys: dict[str, object]) -> None:
    """All but the first layer's: nothing needs the gradient of its inputs."""
    recipe = tiny_recipe(dtype="float32", **keys)

    works = step_cost(architecture("llama"), recipe, CARD).works

    found = sum(work.flops for work in works if work.name != "attention")
    assert found == pytest.approx(counted(**keys), rel=0.06)


def test_a_7b_forward_is_two_operations_a_weight_and_token() -> None:
    """Kaplan et al., 2020: 2 N a token forward; frozen backward as much, adapters."""
    linear = sum(work.flops for work in cost(rank=1).works if "linear" in work.name)

    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert linear == pytest.approx(4 * weights * 1024, rel=0.002)


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"checkpointing": "full"}, {}),
        ({"checkpointing": "full"}, {"checkpointing": "full", "every_n_layers": 4}),
        ({"checkpointing": "full", "offload": True}, {"checkpointing": "full"}),
        ({"quantization": "nf4-double"}, {}),
        ({"loss": "chunked"}, {"loss": "liger"}),
        ({"method": "full"}, {}),
        ({"rank": 256}, {"rank": 8}),
        ({"attention": "eager"}, {}),
    ],
)
def test_direction_of_each_knob(
    slower: dict[str, object], faster: dict[str, object]
) -> None:
    assert cost(**slower).ratio_to(cost(**faster)) < 1


def test_recomputation_costs_a_third_at_most() -> None:
    """One more forward beside a forward and a frozen backward of the same size."""
    ratio = cost(checkpointing="full").ratio_to(cost())

    assert 2 / 3 <= ratio < 0.75


def test_accumulation_changes_the_step_and_hardly_the_rate() -> None:
    one, four = cost(), cost(accumulation=4)

    assert four.tokens == 4 * one.tokens
    assert four.flops == pytest.approx(4 * one.flops)
    assert one.ratio_to(four) == pytest.approx(1, abs=0.01)


def test_experts_that_see_no_token_cost_no_operations() -> None:
    mixtral = inspect("mistralai/Mixtral-8x7B-v0.1")

    works = step_cost(mixtral, Recipe(targets="attention"), CARD).works

    experts = sum(work.flops for work in works if work.name == "experts")
    active = 32 * 2 * 3 * 4096 * 14336
    assert experts == pytest.approx(2 * 2 * active * 512)


def test_card_of_unknown_rates_is_refused() -> None:
    with pytest.raises(InputError, match="bf16 rate"):
        step_cost(LLAMA, Recipe(), find_gpu("24GB"))


def test_assumptions_are_said() -> None:
    said = cost(dtype="float32", checkpointing="full", offload=True).assumptions

    assert len(said) == 4
    assert math.isfinite(cost().seconds)
