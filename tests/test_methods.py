"""What methods say of layers and recipes, without torch: counts, shapes, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from memplan import checks, methods
from memplan.architecture import Architecture, Linear
from memplan.catalog import inspect
from memplan.errors import InputError, UnknownNameError
from memplan.recipe import Recipe


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return inspect("huggyllama/llama-7b")


def count(architecture: Architecture, **keys: Any) -> int:
    """What a recipe trains of a model."""
    return methods.trained_in_adapters(architecture, Recipe(**keys))


LORA_64 = 159_907_840


VECTORS: list[tuple[dict[str, Any], int]] = [
    ({"method": "lora", "rank": 8}, 19_988_480),
    ({"method": "lora-plus", "rank": 16}, 39_976_960),
    ({"method": "relora", "rank": 64}, LORA_64),
    ({"method": "q-bara", "rank": 64}, LORA_64),
    ({"method": "q-bara", "rank": 64, "method_options": {"lambda": 8}}, LORA_64),
    # 224 layers with two numbers more each.
    ({"method": "ir-qlora", "rank": 64}, 159_908_288),
    # QA-LoRA's table: 89 million.
    ({"method": "qa-lora", "rank": 64}, 89_309_184),
    ({"method": "qa-hira"}, 202_375_168),
    ({"method": "qa-hira", "method_options": {"lambda1": 8}}, 101_187_584),
    ({"method": "adalora", "rank": 12}, 29_985_408),
    ({"method": "adaq-lora", "rank": 64}, 159_922_176),
    ({"method": "dora", "rank": 64}, 161_267_712),
    ({"method": "lora-fa", "rank": 64}, 87_031_808),
    ({"method": "vera", "rank": 256}, 1_417_216),
    ({"method": "houlsby", "rank": 64}, 33_820_672),
    ({"method": "houlsby", "rank": 256}, 134_496_256),
    # q and v alone.
    ({"rank": 8, "targets": ["q_proj", "v_proj"]}, 4_194_304),
    ({"method": "lora", "rank": 64}, LORA_64),
    ({"method": "rslora", "rank": 64}, LORA_64),
    ({"method": "adalora", "rank": 64}, 159_922_176),
    ({"method": "dora", "rank": 8}, 21_348_352),
    ({"method": "dora", "rank": 16}, 41_336_832),
]
"""The papers' counts, and shapes worked by hand: 4 x 4096², 3 x 4096 x 11008."""


@pytest.mark.parametrize(("keys", "trainable"), VECTORS, ids=str)
def test_what_is_trained_of_llama(
    llama: Architecture, keys: dict[str, Any], trainable: int
) -> None:
    assert count(llama, **keys) == trainable


BY_LAYER: list[tuple[dict[str, Any], int]] = [
    # As many as LoRA-FA: one factor of r x o.
    (
        {"method": "peft", "rank": 64, "method_options": {"peft_type": "MISS"}},
        87_031_808,
    ),
    ({"method": "qa-hira", "lambda_pattern": {".*mlp.*": 8}}, 134_742_016),
    # 67,108,864 of attention, and half of 92,798,976 of MLPs.
    ({"rank": 64, "rank_pattern": {".*mlp.*": 32}}, 113_508_352),
]
"""Installed alone: a tuner that PEFT counts, and uneven ones."""


@pytest.mark.parametrize(("keys", "trainable"), [*VECTORS, *BY_LAYER], ids=str)
def test_as_much_is_trained_once_it_is_installed(
    llama: Architecture, keys: dict[str, Any], trainable: int
) -> None:
    """On the meta device, in one of the 32 equal layers."""
    from memplan.inspector import inspect as inspect_source
    from memplan.model_source import ModelSource
    from memplan.training import model as training_model

    config = dict(llama.config) | {"num_hidden_layers": 1}
    one = inspect_source(ModelSource(name="one", origin="file", config=config))
    recipe = Recipe(**keys)
    model = training_model.adapt(training_model.build(one, recipe), one, recipe)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert 32 * trained == trainable


@pytest.mark.parametrize(
    ("name", "lora", "qa_lora"),
    [
        ("huggyllama/llama-13b", 250_347_520, 139_878_400),
        ("huggyllama/llama-30b", 487_587_840, 272_363_520),
        ("huggyllama/llama-65b", 799_539_200, 446_545_920),
    ],
)
def test_what_is_trained_of_larger_llamas(name: str, lora: int, qa_lora: int) -> None:
    """QA-LoRA's table has 250, 488 and 800 million beside 140, 272 and 447."""
    try:
        architecture = inspect(name)
    except UnknownNameError:
        pytest.skip(f"{name} is not in the catalog")

    assert count(architecture, rank=64) == lora
    assert count(architecture, method="qa-lora", rank=64) == qa_lora


PATTERNED = ("lora", "dora", "rslora", "lora-plus", "lora-fa", "relora", "ir-qlora")


@pytest.mark.parametrize(
    "name",
    [*PATTERNED, "adalora", "adaq-lora", "houlsby", "q-bara", "qa-lora", "vera"],
)
def test_more_rank_trains_more(llama: Architecture, name: str) -> None:
    assert count(llama, method=name, rank=16) > count(llama, method=name, rank=8)


class TestUnevenRanks:
    """As in the experiments by kind and depth of layers."""

    MLP = ".*mlp.*"
    SECOND_HALF = r".*\.(1[6-9]|2\d|3[01])\..*"

    def test_by_kind(self, llama: Architecture) -> None:
        """An MLP's share of LoRA's parameters is 58.033 %, halved 29.016 %."""
        halved = count(llama, rank=64, rank_pattern={self.MLP: 32})
        quartered = count(llama, rank=64, rank_pattern={self.MLP: 16})

        assert 1 - halved / LORA_64 == pytest.approx(0.29016, abs=1e-5)
        assert 1 - quartered / LORA_64 == pytest.approx(0.43525, abs=1e-5)

    def test_by_depth(self, llama: Architecture) -> None:
        halved = count(llama, rank=64, rank_pattern={self.SECOND_HALF: 32})

        assert halved == LORA_64 * 3 // 4

    def test_group_sizes_by_kind(self, llama: Architecture) -> None:
        """(8, 8) for MLPs beside (4, 8): the paper's 33.42 % less."""
        even = count(llama, method="qa-hira")
        uneven = count(llama, method="qa-hira", lambda_pattern={self.MLP: 8})

        assert uneven == 134_742_016
        assert 1 - uneven / even == pytest.approx(0.33420, abs=1e-5)

    def test_the_first_key_that_matches_counts(self) -> None:
        pattern = {"q_proj": 1, ".*proj": 2}

        assert methods.matching(pattern, "model.layers.0.self_attn.q_proj") == 1
        assert methods.matching(pattern, "model.layers.0.self_attn.k_proj") == 2
        assert methods.matching(pattern, "lm_head") is None

    def test_alphas(self) -> None:
        recipe = Recipe(rank=4, alpha_pattern={"q_proj": 3.0})

        assert methods.alpha_at(recipe, "a.q_proj") == 3.0
        assert methods.alpha_at(recipe, "a.k_proj") == 8.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"method": "q-bara", "method_options": {"lambda": 3}},
            r"lambda: 3 does not divide the 4096 inputs of model.layers.0.self_attn.q_",
        ),
        (
            {"method": "qa-lora", "method_options": {"group_size": 100}},
            "group_size: 100 does not divide the 4096 inputs",
        ),
        (
            {"method": "qa-hira", "method_options": {"lambda2": 6}},
            "lambda2: 6 does not divide the 4096 outputs",
        ),
        (
            {"method": "ir-qlora", "rank": 48},
            "rank: 48 does not divide the 4096 inputs",
        ),
        (
            {"method": "q-bara", "lambda_pattern": {"down_proj": 5}},
            r"lambda: 5 does not divide the 11008 inputs of .*down_proj",
        ),
        (
            {"method": "adalora", "rank": 8, "method_options": {"target_rank": 8}},
            "target_rank: 8 is not below the rank 8",
        ),
        ({"method": "adaq-lora", "rank": 1}, "target_rank: 1 is not below the rank 1"),
        (
            {
                "method": "adalora",
                "method_options": {"tinit": 90, "total_step": 100, "tfinal": 10},
            },
            "tinit: 90 leaves no step for masking before step 90",
        ),
        (
            {
                "method": "adaq-lora",
                "method_options": {"prune_physically": True},
                "optimizer": "adamw-8bit",
            },
            "optimizer: 'adamw-8bit' keeps states",
        ),
        ({"method": "peft"}, "peft_type: None is unknown"),
        (
            {"method": "peft", "method_options": {"peft_type": "LHA"}},
            "peft_type: 'LHA' is unknown; .*LOHA",
        ),
        (
            {"method": "peft", "method_options": {"peft_type": "ADALORA"}},
            "is a method of its own; use method adalora",
        ),
        (
            {
                "method": "peft",
                "method_options": {"peft_type": "LOKR"},
                "quantization": "nf4-double",
            },
            "quantization: 'nf4-double' cannot carry LOKR",
        ),
        (
            {"method": "qa-lora", "method_options": {"pooling": "max"}},
            "pooling: 'max' is unknown",
        ),
        (
            {"method": "lora", "method_options": {"lambda": 2}},
            "method_options: 'lambda' is unknown; .*lora has no options",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_refused_with_its_numbers(
    llama: Architecture, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, UnknownNameError), match=message):
        checks.check(llama, Recipe(**keys))


def test_unused_keys_are_noted(llama: Architecture) -> None:
    keys = {"method": "vera", "rank_pattern": {"q_proj": 4}, "lambda_pattern": {"x": 2}}

    notes = checks.check(llama, Recipe(**keys))

    assert "Method vera does not use rank_pattern." in notes
    assert "Method vera does not use lambda_pattern." in notes


PATTERN = {"rank_pattern": {"down_proj": 2}}
UNPATTERNED = [
    *({"method": name} for name in ("vera", "adalora", "adaq-lora")),
    {"method": "peft", "method_options": {"peft_type": "MISS"}},
    {"method": "peft", "method_options": {"peft_type": "OFT"}},
]


@pytest.mark.parametrize("keys", UNPATTERNED, ids=str)
def test_a_rank_pattern_that_is_not_used_changes_nothing(
    llama: Architecture, keys: dict[str, Any]
) -> None:
    """It is said, and neither counted nor installed, however it is spelled."""
    plain, patterned = Recipe(rank=8, **keys), Recipe(rank=8, **keys, **PATTERN)
    name = keys.get("method_options", {}).get("peft_type", keys["method"])

    assert f"Method {name} does not use rank_pattern." in checks.check(llama, patterned)
    assert count(llama, **patterned.to_json()) == count(llama, **plain.to_json())


def test_tuners_read_the_keys_that_their_configs_have() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    from memplan.methods import peft as tuners

    theirs = {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "target_modules": "targets",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    }
    for peft_type in tuners.TUNERS:
        recipe = Recipe(method="peft", method_options={"peft_type": peft_type})
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
        fields = {field.name for field in dataclasses.fields(config)}
        read = set()
        for key, ours in theirs.items():
            names = tuners.SYNONYMS.get(key, (key,))
            known = {name.format(peft_type.lower()) for name in names} & fields
            if known and not (ours == "rank" and peft_type in tuners.RANK_IS_A_COUNT):
                read.add(ours)

        assert read == tuners.READ_KEYS[peft_type], peft_type
        assert read <= methods.find("peft").reads(recipe)


def test_libraries_with_a_workspace_of_their_own_are_noted(llama: Architecture) -> None:
    recipe = Recipe(method="peft", method_options={"peft_type": "C3A"})

    assert any("cuFFT" in note for note in checks.check(llama, recipe))


def test_vera_shares_matrices_of_the_widest_sides(llama: Architecture) -> None:
    """Twice 256 x 11008 in float32: 22.5 MB."""
    linears = [linear for _, linear in llama.all_linears() if linear.kind != "head"]

    shapes = methods.find("vera").shared_shapes(linears, 256)

    assert shapes == ((256, 11008), (11008, 256))


def test_serial_adapters_stand_behind_the_last_projections(llama: Architecture) -> None:
    recipe = Recipe(method="houlsby")

    ends = {
        path.rpartition(".")[2] for path, _ in methods.adapted_linears(llama, recipe)
    }

    assert ends == {"o_proj", "down_proj"}


def test_patterned_options_replace_given_ones() -> None:
    recipe = Recipe(
        method="qa-lora",
        method_options={"group_size": 16},
        lambda_pattern={"down_proj": 64},
    )

    assert methods.options_at(recipe, "x.q_proj")["group_size"] == 16
    assert methods.options_at(recipe, "x.down_proj")["group_size"] == 64
    assert methods.options_at(recipe, "x.down_proj")["pooling"] == "mean"


def test_flow_keeps_one_copy_of_what_dropout_gives() -> None:
    """10 tokens of 8 numbers: their own float32 copy, or a mask and the result."""
    plain = methods.Flow(tokens=10, input_bytes=2, adapter_bytes=4)
    dropped = methods.Flow(tokens=10, input_bytes=2, adapter_bytes=4, dropout=0.1)
    shared = methods.Flow(tokens=10, input_bytes=4, adapter_bytes=4)

    assert plain.read_bytes(8) == 10 * 8 * 4
    assert dropped.read_bytes(8) == 10 * 8 * (1 + 4)
    assert shared.read_bytes(8) == 0


def test_names_of_single_layers_are_adapted_alone(llama: Architecture) -> None:
    recipe = Recipe(targets=["q_proj"])

    found = methods.adapted_linears(llama, recipe)

    assert len(found) == 32
    assert all(isinstance(linear, Linear) for _, linear in found)
