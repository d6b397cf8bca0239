from __future__ import annotations

import json
import math

import pytest

from memplan.architecture import Architecture, Block, Linear, Parameter

WIDE = Linear(path="mlp.up", in_features=4, out_features=6, bias=True, kind="mlp")
FLAT = Linear(path="q", in_features=4, out_features=4, bias=False, kind="attention")
NORM = Parameter(path="norm.weight", shape=(4,), kind="norm")
EXPERTS = Parameter(path="experts.up", shape=(8, 4, 6), kind="experts")
EMBEDDING = Parameter(path="embed.weight", shape=(10, 4), kind="embedding")
HEAD = Linear(path="head", in_features=4, out_features=10, bias=False, kind="head")

TINY = Architecture(
    name="own/tiny",
    model_type="tiny",
    class_name="TinyForCausalLM",
    config={"model_type": "tiny"},
    hidden_size=4,
    vocab_size=10,
    max_positions=16,
    learned_positions=False,
    generative=True,
    tied=False,
    num_experts=8,
    blocks=(
        Block(
            name="Dense",
            stack="model.layers",
            layers=(0, 2),
            linears=(FLAT, WIDE),
            parameters=(NORM,),
        ),
        Block(
            name="Sparse",
            stack="model.layers",
            layers=(1,),
            linears=(FLAT,),
            parameters=(EXPERTS,),
        ),
        Block(name="Eye", stack="eyes", layers=(0,), linears=(FLAT,), parameters=()),
    ),
    linears=(HEAD,),
    parameters=(EMBEDDING,),
    notes=("a note",),
)


def test_linear_counts_its_weight_and_its_bias() -> None:
    assert (WIDE.num_weights, WIDE.num_parameters) == (24, 30)
    assert (FLAT.num_weights, FLAT.num_parameters) == (16, 16)


def test_parameter_counts_its_shape() -> None:
    assert EXPERTS.num_parameters == 192
    assert Parameter(path="step", shape=(), kind="other").num_parameters == 1


def test_block_stands_for_its_layers() -> None:
    dense = TINY.blocks[0]

    assert dense.num_parameters == 16 + 30 + 4
    assert dense.paths == ("model.layers.0", "model.layers.2")


def test_model_counts_every_layer_of_a_block() -> None:
    assert TINY.total_parameters == 2 * 50 + (16 + 192) + 16 + 40 + 40


def test_kinds_add_up_to_the_whole() -> None:
    assert TINY.parameters_by_kind == {
        "embedding": 40,
        "attention": 4 * 16,
        "mlp": 2 * 30,
        "experts": 192,
        "norm": 2 * 4,
        "head": 40,
    }
    assert sum(TINY.parameters_by_kind.values()) == TINY.total_parameters


def test_layers_are_counted_by_stack() -> None:
    assert TINY.layers_by_stack == {"model.layers": 3, "eyes": 1}
    assert TINY.num_layers == 4


def test_every_linear_has_its_full_path() -> None:
    assert list(TINY.all_linears()) == [
        ("model.layers.0.q", FLAT),
        ("model.layers.0.mlp.up", WIDE),
        ("model.layers.2.q", FLAT),
        ("model.layers.2.mlp.up", WIDE),
        ("model.layers.1.q", FLAT),
        ("eyes.0.q", FLAT),
        ("head", HEAD),
    ]


def test_architecture_survives_its_own_json() -> None:
    text = json.dumps(TINY.to_json())

    assert Architecture.from_json(json.loads(text)) == TINY


@pytest.mark.parametrize(
    ("value", "tag"),
    [(math.inf, "Infinity"), (-math.inf, "-Infinity"), (math.nan, "NaN")],
)
def test_json_holds_numbers_that_json_has_not(value: float, tag: str) -> None:
    config = {"model_type": "tiny", "limits": [0.5, {"most": value}]}
    architecture = Architecture.from_json(TINY.to_json() | {"config": config})

    written = json.dumps(architecture.to_json(), allow_nan=False)

    assert json.loads(written)["config"]["limits"] == [
        0.5,
        {"most": {"__float__": tag}},
    ]
