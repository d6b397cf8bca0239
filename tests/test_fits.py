"""Answers are what single estimates say; what is not estimated cannot fit."""

from __future__ import annotations

import dataclasses

import pytest
from small_llama import architecture

from memplan import estimator, tapes
from memplan.catalog import catalog_models, inspect
from memplan.errors import InputError, UnknownNameError
from memplan.fits import Answer, Way, least_weights_bytes, ranked, ways, what_fits
from memplan.footprint import Footprint, Moment
from memplan.gpu import find_gpu
from memplan.recipe import Recipe

CARD = find_gpu("12GB")
MOMENT = Moment(label="1.forward", allocated_bytes=1, reserved_bytes=1)


def test_the_usual_ways_are_four() -> None:
    assert [way.name for way in ways()] == [
        "full fine-tuning",
        "LoRA",
        "LoRA on int8",
        "QLoRA (nf4-double)",
    ]


@pytest.mark.parametrize(
    ("methods", "schemes", "expected"),
    [
        (("dora",), (), ["dora", "dora on int8", "dora on nf4-double"]),
        ((), ("nf4",), ["lora on nf4"]),
        (("full", "lora"), ("none",), ["full fine-tuning", "LoRA"]),
        (("lora",), ("int8", "fp4"), ["LoRA on int8", "lora on fp4"]),
    ],
)
def test_asked_ways_are_every_pair_that_can_be(
    methods: tuple[str, ...], schemes: tuple[str, ...], expected: list[str]
) -> None:
    assert [way.name for way in ways(methods, schemes)] == expected


def test_ways_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be used with method full"):
        ways(("full",), ("nf4",))
    with pytest.raises(UnknownNameError, match="lora"):
        ways(("lorra",), ())
    with pytest.raises(UnknownNameError, match="nf4"):
        ways((), ("nf5",))


@pytest.mark.parametrize(
    "card", ["RTX 3060", "A100-SXM4-80GB", "H100 80GB HBM3", "B200", "T4"]
)
def test_the_whole_catalog_is_answered_from_shipped_tapes(card: str) -> None:
    models = [one.architecture for one in catalog_models()]
    generative = [model for model in models if model.generative]

    with tapes.known_only():
        answers = [*what_fits(generative, ways(), {}, find_gpu(card), thorough=False)]

    estimated = [answer for answer in answers if answer.footprint is not None]
    assert [answer.problem for answer in answers if answer.problem] == []
    assert len(estimated) > len(generative)


def test_an_answer_is_the_estimate_of_its_recipe() -> None:
    asked = ways()
    answers = list(what_fits([architecture()], asked, {"rank": 4}, CARD, thorough=True))

    assert [answer.way for answer in answers] == list(asked)
    for answer in answers:
        recipe = Recipe(
            method=answer.way.method,
            quantization=answer.way.quantization,
            rank=4,
            checkpointing="full",
            sequence_length=1024,
        )
        assert answer.recipe == recipe
        assert answer.footprint == estimator.run(architecture(), recipe, CARD).footprint
        assert answer.fits
        assert answer.longest_sequence == architecture().max_positions


def test_the_largest_that_fits_comes_first() -> None:
    names = (
        "Qwen/Qwen2.5-7B",
        "meta-llama/Llama-2-70b-hf",
        "meta-llama/Llama-2-13b-hf",
    )
    lora = Way(method="lora", quantization="none")
    fitting, *large = (
        Answer(
            architecture=inspect(name),
            way=lora,
            recipe=Recipe(),
            footprint=Footprint(
                moments=(MOMENT,), context_bytes=0, capacity_bytes=capacity
            ),
        )
        for name, capacity in zip(names, (2, 0, 0), strict=True)
    )
    larger = dataclasses.replace(
        fitting, architecture=inspect("meta-llama/Meta-Llama-3-8B")
    )
    full = dataclasses.replace(fitting, way=Way(method="full", quantization="none"))
    found = ranked([*large, fitting, full, larger], [full.way, lora])

    assert found == [full, larger, fitting, large[1], large[0]]


def test_what_weighs_more_than_the_card_is_not_estimated() -> None:
    asked = (Way(method="lora", quantization="none"),)
    large = inspect("meta-llama/Llama-2-13b-hf")
    (answer,) = what_fits([large], asked, {}, CARD, thorough=False)

    assert answer.footprint is None
    assert not answer.fits
    assert answer.weights_bytes == 2 * large.total_parameters > CARD.budget_bytes


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4-double", "fp4"])
def test_the_least_weights_are_less_than_those_that_are_stored(scheme: str) -> None:
    recipe = Recipe(quantization=scheme)
    stored = estimator.run(architecture(), recipe, CARD).parts.weights.total

    assert 0.4 * stored < least_weights_bytes(architecture(), recipe) <= stored


def test_learned_positions_end_sequences() -> None:
    learned = dataclasses.replace(
        architecture(), learned_positions=True, max_positions=128
    )
    (answer,) = what_fits(
        [learned], ways(("lora",), ("none",)), {}, CARD, thorough=True
    )

    assert answer.recipe.sequence_length == 128
    assert answer.longest_sequence == 128


def test_what_cannot_run_on_the_card_says_why() -> None:
    volta = find_gpu("V100-32GB")
    (answer,) = what_fits(
        [architecture()], ways((), ("int8",)), {}, volta, thorough=True
    )

    assert "7.5" in answer.problem
    assert answer.footprint is None


def test_keys_that_no_recipe_has_are_refused() -> None:
    with pytest.raises(InputError, match="rank"):
        list(what_fits([architecture()], ways(), {"rank": 0}, CARD, thorough=True))
