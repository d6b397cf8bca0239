"""Terms and their parts sum to the footprint; their numbers are the architecture's."""

from __future__ import annotations

import pytest
from small_llama import CONFIG, architecture

from memplan import estimator
from memplan.estimator.equations import Term, terms
from memplan.gpu import find_gpu
from memplan.recipe import Recipe

RECIPES = {
    "lora": Recipe(rank=4),
    "qlora": Recipe(quantization="nf4-double", checkpointing="full", batch_size=2),
    "int8": Recipe(quantization="int8"),
    "full": Recipe(method="full"),
    "paged": Recipe(method="full", optimizer="paged-adamw-8bit"),
    "accumulated": Recipe(accumulation=4, max_grad_norm=1.0, optimizer="sgd"),
}


def found(recipe: Recipe) -> dict[str, Term]:
    gpu = find_gpu("12GB")
    estimate = estimator.replayed(estimator.run(architecture(), recipe, gpu), gpu)
    return {t.name: t for t in terms(estimate)}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_terms_sum_to_the_device_s_bytes(recipe: Recipe) -> None:
    gpu = find_gpu("12GB")
    footprint = estimator.estimate(architecture(), recipe, gpu)

    total = sum(term.num_bytes for term in found(recipe).values())
    assert total == footprint.device_bytes(footprint.peak)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_shares_sum_to_their_term(recipe: Recipe) -> None:
    for term in found(recipe).values():
        assert sum(share.num_bytes for share in term.shares) == term.num_bytes
        assert all(share.num_bytes >= 0 for share in term.shares), term


def linear_weights() -> int:
    """q, o: 256 x 256; k, v: 256 x 128; gate, up, down: 256 x 512; two layers."""
    return 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)


def test_quantised_weights_are_counted_from_the_shapes() -> None:
    share = found(RECIPES["qlora"])["weights"].shares[0]

    assert (
        share.text == f"nf4-double: {linear_weights():,} weights of 14 layers x 4 bits"
    )
    assert share.num_bytes == linear_weights() // 2


def test_adapters_are_r_times_inputs_and_outputs() -> None:
    sides = 2 * (2 * 512 + 2 * 384 + 3 * 768)
    share = found(RECIPES["lora"])["adapters"].shares[0]

    assert share.text == f"{4 * sides:,} numbers x 4 B"


def test_adamw_keeps_two_numbers_for_each_trained_one() -> None:
    share = found(RECIPES["full"])["optimizer"].shares[0]
    numbers = architecture().total_parameters

    assert share.text == f"adamw: {numbers:,} trained numbers x (2 + 2) B"
    assert share.num_bytes == 4 * numbers


def test_logits_are_tokens_by_vocabulary() -> None:
    recipe = Recipe(batch_size=8, sequence_length=2048)
    share = found(recipe)["logits"].shares[0]

    assert share.text.startswith(f"8 x 2048 x {CONFIG['vocab_size']:,} logits x ")
