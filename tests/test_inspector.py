"""Models built on the meta device and read, from the whole catalog to small ones."""

from __future__ import annotations

import csv
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memplan import inspector
from memplan.architecture import Architecture, Linear
from memplan.errors import InputError, UnknownNameError
from memplan.model_source import ModelSource, catalog_names, read_catalog

CATALOG_CSV = Path(__file__).parents[2] / "shared" / "catalog" / "models.csv"

OWN_TREES = {
    "THUDM/chatglm2-6b": 6_243_584_000,
    "THUDM/chatglm3-6b": 6_243_584_000,
    "baichuan-inc/Baichuan2-7B-Base": 7_505_973_248,
    "internlm/internlm2-7b": 7_737_708_544,
    "openbmb/MiniCPM-2B-sft-bf16": 2_724_880_896,
}
"""Models whose published code cannot be had offline, and their published sizes."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Every model of the catalog, inspected afresh, and the time that took."""

    catalog: dict[str, Architecture]
    seconds: float


@pytest.fixture(scope="module")
def walk() -> Walk:
    started = time.process_time()
    catalog = {name: inspector.inspect(read_catalog(name)) for name in catalog_names()}
    return Walk(catalog, time.process_time() - started)


@pytest.fixture(scope="module")
def catalog(walk: Walk) -> dict[str, Architecture]:
    return walk.catalog


def test_the_whole_catalog_takes_under_half_a_minute(walk: Walk) -> None:
    assert len(walk.catalog) >= 170
    assert walk.seconds < 30


def source(**config: Any) -> ModelSource:
    return ModelSource(name="own/model", origin="file", config=config)


def test_shipped_architectures_are_what_inspecting_gives(
    catalog: dict[str, Architecture],
) -> None:
    for name, fresh in catalog.items():
        shipped = read_catalog(name).architecture
        identity = {"name": name, "config": read_catalog(name).config}

        assert json.loads(json.dumps(fresh.to_json())) == shipped | identity, name


def test_catalog_counts_are_the_computed_ones(
    catalog: dict[str, Architecture],
) -> None:
    for name, fresh in catalog.items():
        computed = read_catalog(name).facts["parameters_computed"]
        published = OWN_TREES.get(name)

        assert fresh.total_parameters == (computed or published), name


def test_counts_are_those_of_the_table(catalog: dict[str, Architecture]) -> None:
    if not CATALOG_CSV.exists():
        pytest.skip("the table of models is not here")
    with CATALOG_CSV.open(newline="") as file:
        counts = {
            row["name"]: int(row["n_params_computed"])
            for row in csv.DictReader(file)
            if row["n_params_computed"]
        }

    assert len(counts) >= 165
    assert {name: catalog[name].total_parameters for name in counts} == counts


def test_trees_of_memplan_s_own_have_the_published_sizes(
    catalog: dict[str, Architecture],
) -> None:
    assert {name: catalog[name].total_parameters for name in OWN_TREES} == OWN_TREES


def test_kinds_add_up_to_the_whole(catalog: dict[str, Architecture]) -> None:
    for name, fresh in catalog.items():
        assert sum(fresh.parameters_by_kind.values()) == fresh.total_parameters, name


def test_attention_and_mlp_are_told_apart_in_every_family(
    catalog: dict[str, Architecture],
) -> None:
    for name, fresh in catalog.items():
        for block in fresh.blocks:
            kinds = {linear.kind for linear in block.linears}
            kinds |= {parameter.kind for parameter in block.parameters}

            assert "attention" in kinds, name
            assert kinds & {"mlp", "experts"}, name


def test_llama_block_is_read_off_the_tree(catalog: dict[str, Architecture]) -> None:
    llama = catalog["meta-llama/Llama-3.1-8B"]
    (block,) = llama.blocks

    # Grouped-query attention: 32 heads of 128, 8 of them for keys and values.
    assert [(one.path, one.in_features, one.out_features) for one in block.linears] == [
        ("self_attn.q_proj", 4096, 4096),
        ("self_attn.k_proj", 4096, 1024),
        ("self_attn.v_proj", 4096, 1024),
        ("self_attn.o_proj", 4096, 4096),
        ("mlp.gate_proj", 4096, 14336),
        ("mlp.up_proj", 4096, 14336),
        ("mlp.down_proj", 14336, 4096),
    ]
    assert block.layers == tuple(range(32))
    assert [(one.path, one.kind) for one in llama.linears] == [("lm_head", "head")]
    assert not llama.tied
    assert not llama.learned_positions


def test_gpt2_is_tied_has_learned_positions_and_transposed_weights(
    catalog: dict[str, Architecture],
) -> None:
    gpt2 = catalog["openai-community/gpt2"]

    assert gpt2.tied
    assert gpt2.learned_positions
    assert gpt2.linears == ()
    assert gpt2.blocks[0].linears[0] == Linear(
        path="attn.c_attn",
        in_features=768,
        out_features=3 * 768,
        bias=True,
        kind="attention",
        transposed=True,
    )


def test_experts_are_stacked_and_have_a_router(
    catalog: dict[str, Architecture],
) -> None:
    mixtral = catalog["mistralai/Mixtral-8x7B-v0.1"]
    counts = mixtral.parameters_by_kind

    assert mixtral.num_experts == 8
    assert counts["experts"] == 32 * 8 * 3 * 4096 * 14336
    assert counts["router"] == 32 * 8 * 4096
    assert any("16 bits" in note for note in mixtral.notes)


def test_kinds_of_layers_are_told_apart(catalog: dict[str, Architecture]) -> None:
    dense, sparse = catalog["deepseek-ai/DeepSeek-V2-Lite"].blocks
    linear, full = catalog["Qwen/Qwen3.5-9B"].blocks[1:]

    assert dense.name == "DeepseekV2DecoderLayer (DeepseekV2MLP)"
    assert sparse.name == "DeepseekV2DecoderLayer (DeepseekV2Moe)"
    assert (dense.layers, sparse.layers) == ((0,), tuple(range(1, 27)))
    assert linear.name == "Qwen3_5DecoderLayer (linear_attention)"
    assert full.layers == tuple(range(3, 32, 4))


def test_vision_tower_is_a_stack_of_its_own(catalog: dict[str, Architecture]) -> None:
    gemma = catalog["google/gemma-4-26B-A4B"]

    assert gemma.layers_by_stack == {
        "model.vision_tower.encoder.layers": 27,
        "model.language_model.layers": 30,
    }
    assert gemma.generative


def test_positions_of_an_image_are_not_those_of_a_text(
    catalog: dict[str, Architecture],
) -> None:
    """Gemma 3's vision tower has a table of 4,096 patches; its text is rotated."""
    gemma = catalog["google/gemma-3-4b-pt"]
    tables = [one.path for one in gemma.parameters if "position_embedding" in one.path]

    assert tables == ["model.vision_tower.embeddings.position_embedding.weight"]
    assert not gemma.learned_positions
    assert catalog["facebook/opt-125m"].learned_positions


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("google-bert/bert-base-uncased", "BertModel"),
        ("google/flan-t5-small", "T5ForConditionalGeneration"),
        ("google/vit-base-patch16-224-in21k", "ViTModel"),
    ],
)
def test_encoders_are_inspected_and_not_generative(
    catalog: dict[str, Architecture], name: str, class_name: str
) -> None:
    assert catalog[name].class_name == class_name
    assert not catalog[name].generative


def test_encoder_and_decoder_are_two_stacks(catalog: dict[str, Architecture]) -> None:
    t5 = catalog["google/flan-t5-small"]

    assert t5.layers_by_stack == {"encoder.block": 8, "decoder.block": 8}


@pytest.mark.parametrize(
    "model_type",
    ["xglm", "mamba2", "jamba", "zamba", "longcat_flash", "recurrent_gemma", "clip"],
)
def test_family_that_the_catalog_lacks_is_read_off_its_tree(model_type: str) -> None:
    """Layers of several classes, layers that share modules, and no token table."""
    model = source(model_type=model_type)

    architecture = inspector.inspect(model)

    built = inspector.build_meta_model("built", inspector.build_config(model))
    numbers = {id(p): p.numel() for p in built.parameters()}
    assert architecture.total_parameters == sum(numbers.values())
    assert architecture.num_layers > 1


def test_what_mixes_tokens_without_attention_is_no_mlp() -> None:
    mamba = inspector.inspect(source(model_type="mamba2", num_hidden_layers=2))

    assert mamba.parameters_by_kind.keys() == {"embedding", "other", "norm", "head"}


def test_tagged_infinity_is_a_number() -> None:
    """So transformers 5 saves a Mamba2 config; a hub's older file has Infinity."""
    tagged = {"__float__": "Infinity"}
    small = {"model_type": "mamba2", "num_hidden_layers": 1}

    config = inspector.build_config(source(**small, time_step_limit=[0.0, tagged]))

    assert list(config.time_step_limit) == [0.0, float("inf")]


def test_labels_of_a_classifier_are_not_spelt_out() -> None:
    config = inspector.build_config(source(model_type="llama", num_labels=10**12))

    assert config.num_labels == 2


@pytest.mark.parametrize("key", ["num_hidden_layers", "depth", "n_layers"])
def test_too_many_layers_are_refused_wherever_they_are_named(key: str) -> None:
    nested = {"model_type": "qwen3", "vision_config": [{key: 10**9}]}

    with pytest.raises(InputError, match=f"{key}: 1000000000 is more than 2048 layers"):
        inspector.build_config(source(**nested))


def test_counts_of_tokens_in_a_config_are_not_sizes() -> None:
    seen = {"model_type": "llama", "num_hidden_layers": 1, "tokens_seen": 15 * 10**12}

    assert inspector.inspect(source(**seen)).num_layers == 1


def test_unknown_family_lists_the_near_ones() -> None:
    with pytest.raises(
        UnknownNameError, match="model_type: 'lama' is unknown"
    ) as error:
        inspector.inspect(source(model_type="lama"))

    assert "near: llama" in str(error.value)
    assert "transformers" in str(error.value)


def test_family_with_code_of_its_own_names_the_option() -> None:
    config = {"model_type": "own", "auto_map": {"AutoModel": "modeling_own.OwnModel"}}

    with pytest.raises(UnknownNameError, match="pass --trust-remote-code"):
        inspector.inspect(source(**config))


def test_what_transformers_says_of_a_config_is_passed_on() -> None:
    with pytest.raises(InputError, match="expected int, got str"):
        inspector.inspect(source(model_type="llama", hidden_size="4096"))


def test_inspecting_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        inspector.inspect(read_catalog("google/gemma-3-1b-pt"))


REMOTE_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_is_run_only_when_trusted(tmp_path: Path) -> None:
    config = {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnModel",
        },
        "num_hidden_layers": 2,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    ran = tmp_path / "ran"
    code = f"{REMOTE_CODE}\nopen({str(ran)!r}, 'w').close()\n"
    (tmp_path / "modeling_own.py").write_text(code)
    folder = ModelSource(name=str(tmp_path), origin="folder", config=config, path=file)

    with pytest.raises(UnknownNameError):
        inspector.inspect(folder)
    assert not ran.exists()

    architecture = inspector.inspect(folder, trust_remote_code=True)

    assert ran.exists()
    assert architecture.class_name == "OwnModel"
    assert architecture.num_layers == 2
