"""Recipes that cannot run are refused; those that surprise are noted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.checks import check
from memplan.errors import InputError, UnknownNameError
from memplan.gpu import find_gpu
from memplan.recipe import Recipe

T4 = find_gpu("T4")


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return inspect("meta-llama/Llama-2-7b-hf")


@pytest.fixture(scope="module")
def gpt2() -> Architecture:
    return inspect("openai-community/gpt2")


def test_an_encoder_is_refused() -> None:
    bert = inspect("google-bert/bert-base-uncased")
    with pytest.raises(InputError, match="BertModel, which can be inspected only"):
        check(bert, Recipe())


def test_learned_positions_end(gpt2: Architecture) -> None:
    assert check(gpt2, Recipe(sequence_length=1024)) == ()
    with pytest.raises(InputError, match="1025 is longer than the 1024 positions"):
        check(gpt2, Recipe(sequence_length=1025))


def test_rotary_positions_only_warn(llama: Architecture) -> None:
    (note,) = check(llama, Recipe(sequence_length=2 * 4096))
    assert "longer than the" in note


def test_weights_that_are_trained_cannot_be_quantised(llama: Architecture) -> None:
    with pytest.raises(InputError, match="quantization: 'nf4' cannot be used"):
        check(llama, Recipe(method="full", quantization="nf4"))


def test_int8_needs_tensor_cores_for_it(llama: Architecture) -> None:
    check(llama, Recipe(quantization="int8", dtype="float16"), T4)
    pascal = find_gpu("P100")
    with pytest.raises(InputError, match=r"needs compute capability 7\.5"):
        check(llama, Recipe(quantization="int8"), pascal)


def test_an_option_that_the_method_lacks_is_unknown(llama: Architecture) -> None:
    with pytest.raises(UnknownNameError, match="lora has no options of its own"):
        check(llama, Recipe(method_options={"lambda": 2}))


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        (Recipe(method="full", rank=32), "does not use rank"),
        (Recipe(method="full", dropout=0.1), "does not use dropout"),
        (Recipe(lambda_pattern={"q_proj": 2}), "does not use lambda_pattern"),
        (Recipe(every_n_layers=2), "every_n_layers has no effect"),
        (Recipe(offload=True), "offload has no effect"),
        (Recipe(optimizer="paged-adamw-8bit"), "are paged"),
        (Recipe(autocast="bfloat16", dtype="float32"), "float32 weights"),
        (
            Recipe(method="dora", dropout=0.1, quantization="nf4"),
            "dense copy of every adapted weight",
        ),
    ],
)
def test_what_surprises_is_noted(
    llama: Architecture, recipe: Recipe, word: str
) -> None:
    assert any(word in note for note in check(llama, recipe))


def test_a_plain_recipe_needs_no_note(llama: Architecture) -> None:
    assert check(llama, Recipe(), find_gpu("A100-80GB")) == ()


def test_emulated_bfloat16_is_noted(llama: Architecture) -> None:
    assert any("no native bfloat16" in note for note in check(llama, Recipe(), T4))
    assert check(llama, Recipe(dtype="float16"), T4) == ()
    quantized = Recipe(dtype="float16", quantization="nf4")
    assert any("no native bfloat16" in note for note in check(llama, quantized, T4))


def test_experts_that_stay_in_16_bits_are_noted() -> None:
    mixtral = inspect("mistralai/Mixtral-8x7B-v0.1")
    assert any("16 bits" in note for note in check(mixtral, Recipe()))
    assert dataclasses.replace(mixtral, notes=()).num_experts == 8


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"targets": ("qq_proj",)}, "targets: 'qq_proj' is unknown; near: q_proj"),
        ({"targets": ("q_proj", "proj")}, "targets: 'proj' is unknown"),
        ({"rank_pattern": {"nothing": 4}}, "rank_pattern: 'nothing' matches no"),
        (
            {"targets": ("q_proj",), "alpha_pattern": {"k_proj": 4.0}},
            "alpha_pattern: 'k_proj' matches no",
        ),
        (
            {"trained_modules": ("embed_tokenz",)},
            "trained_modules: 'embed_tokenz' is unknown; near: embed_tokens",
        ),
    ],
)
def test_names_that_nothing_answers_to_are_refused(
    llama: Architecture, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        check(llama, Recipe(**keys))

    assert said in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"targets": ("q_proj", "mlp.up_proj", "lm_head")},
        {"targets": ("layers.3.self_attn.q_proj",)},
        {"rank_pattern": {"q_proj": 4, r"layers\.[0-3]\.mlp\.up_proj": 8}},
        {"trained_modules": ("embed_tokens", "lm_head", "norm", "self_attn")},
        {"method": "full", "targets": ("qq_proj",)},
    ],
)
def test_names_of_the_model_pass(llama: Architecture, keys: dict[str, Any]) -> None:
    check(llama, Recipe(**keys))


@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_a_tied_head_may_be_trained_whole(name: str) -> None:
    check(inspect("openai-community/gpt2"), Recipe(trained_modules=(name,)))


def test_names_are_checked_where_the_head_is_tied_too() -> None:
    with pytest.raises(InputError, match="'lm_heed' is unknown; near: lm_head"):
        check(inspect("openai-community/gpt2"), Recipe(trained_modules=("lm_heed",)))
