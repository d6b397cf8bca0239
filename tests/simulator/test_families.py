"""Every family traces, and every operator that it meets was looked at."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from memplan import inspector, registry, simulator
from memplan.architecture import Architecture
from memplan.catalog import catalog_models, inspect
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.simulator.operators import rule_of
from memplan.simulator.operators.plain import PLAIN

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")


def shallow(name: str) -> Architecture:
    """The model with as few layers as show every kind of its decoder's layers."""
    whole = inspect(name)
    config = copy.deepcopy(dict(whole.config))
    for part, stack_is_decoder in _parts(config):
        num_layers = _layers_for_every_kind(whole) if stack_is_decoder else 1
        for key in _DEPTHS:
            if isinstance(part.get(key), int):
                part[key] = min(part[key], num_layers)
        if "layer_types" in part:
            part["layer_types"] = part["layer_types"][:num_layers]
    return inspector.inspect(ModelSource(name=name, origin="catalog", config=config))


def _parts(config: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    """The decoder's part of a configuration, and those of its towers."""
    if "text_config" not in config:
        return [(config, True)]
    towers = [config[k] for k in ("vision_config", "audio_config") if config.get(k)]
    return [(config["text_config"], True), *((tower, False) for tower in towers)]


def _layers_for_every_kind(architecture: Architecture) -> int:
    decoder = max(architecture.layers_by_stack, key=architecture.layers_by_stack.get)
    kinds = [block.layers[0] for block in architecture.blocks if block.stack == decoder]
    return max(2, max(kinds) + 1)


def recipe(**keys: Any) -> Recipe:
    return Recipe(**{"rank": 8, "sequence_length": 64, "batch_size": 2} | keys)


def unknown_operators(architecture: Architecture, asked: Recipe, card: str) -> set[str]:
    """Operators of a trace that neither have a rule nor are known to need none."""
    traced = simulator.trace(architecture, asked, find_gpu(card), whole=True)
    assert len(traced.log.events) > 100
    names = {operator.name(): operator for operator in traced.operators}
    return {n for n, op in names.items() if n not in PLAIN and rule_of(op) is None}


FP16 = {"dtype": "float16", "compute_dtype": "float16"}

CASES = [
    ("meta-llama/Llama-3.2-1B", "T4", FP16 | {"attention": "auto"}),
    (
        "meta-llama/Llama-2-7b-hf",
        "T4",
        FP16 | {"quantization": "nf4-double", "checkpointing": "full"},
    ),
    ("Qwen/Qwen3-0.6B", "A100 80GB", {"method": "full", "padded": True}),
    ("openai-community/gpt2", "A100 80GB", {"attention": "math", "method": "full"}),
    ("google/gemma-2-2b", "L4", {"method": "dora"}),
    ("google/gemma-3-4b-pt", "H100", {"trainer": "trl", "quantization": "nf4"}),
    ("mistralai/Mixtral-8x7B-v0.1", "H100", {}),
    ("Qwen/Qwen3-30B-A3B", "T4", FP16),
    ("Qwen/Qwen3.5-9B", "A100 80GB", {"offload": True, "checkpointing": "full"}),
    (
        "deepseek-ai/DeepSeek-V2-Lite",
        "H100",
        {"quantization": "nf4", "checkpointing": "full", "reentrant": True},
    ),
    ("openai/gpt-oss-20b", "A100 80GB", {"quantization": "int8"}),
    ("tiiuae/falcon-7b", "A100 80GB", {"method": "dora", "quantization": "nf4"}),
    ("bigscience/bloom-560m", "L4", {"attention": "eager", "padded": True}),
    ("facebook/opt-350m", "A100 80GB", {"method": "full", "dtype": "float32"}),
    (
        "google/gemma-4-26B-A4B",
        "H100",
        {"trainer": "transformers", "autocast": "bfloat16", "accumulation": 2},
    ),
    ("THUDM/chatglm2-6b", "T4", FP16 | {"attention": "efficient", "dropout": 0.1}),
    ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "A100 80GB", {"method": "rslora"}),
]


@pytest.mark.parametrize(("name", "card", "keys"), CASES, ids=[c[0] for c in CASES])
def test_every_operator_was_looked_at(
    name: str, card: str, keys: dict[str, Any]
) -> None:
    assert not unknown_operators(shallow(name), recipe(**keys), card)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (key, name)
        for key, folder in (
            ("optimizer", "optimizers"),
            ("quantization", "quantizations"),
            ("loss", "losses"),
        )
        for name in registry.names(folder)
    ],
)
def test_every_operator_of_every_part_was_looked_at(key: str, part: str) -> None:
    tiny = shallow("HuggingFaceTB/SmolLM2-135M")

    assert not unknown_operators(tiny, recipe(**{key: part}), "A100 80GB")


@pytest.mark.parametrize(
    "name", ["google/gemma-2-2b", "openai/gpt-oss-20b", "bigscience/bloom-560m"]
)
def test_auto_is_eager_where_a_class_has_no_sdpa(name: str) -> None:
    model = shallow(name)
    card = find_gpu("A100 80GB")
    auto = simulator.trace(model, recipe(), card)
    eager = simulator.trace(model, recipe(attention="eager"), card)

    assert auto.log.events == eager.log.events
    with pytest.raises(InputError, match="eager attention alone"):
        simulator.trace(model, recipe(attention="math"), card)


def test_experts_are_adapted_under_the_names_of_their_layers() -> None:
    """As PEFT does for all linear layers, at twice the rank where two are one."""
    model = shallow("mistralai/Mixtral-8x7B-v0.1")
    card = find_gpu("A100 80GB")
    attention = simulator.trace(model, recipe(targets="attention"), card)
    everything = simulator.trace(model, recipe(), card)

    hidden, inner, experts, layers = 4096, 14336, 8, 2
    gate_and_up = 16 * experts * (hidden + 2 * inner)
    down = 8 * experts * (inner + hidden)
    router = 8 * (hidden + experts)
    assert everything.trainable_parameters - attention.trainable_parameters == (
        layers * (gate_and_up + down + router)
    )


@pytest.mark.parametrize(
    ("keys", "field"), [({"dropout": 0.1}, "dropout"), ({"method": "dora"}, "method")]
)
def test_what_peft_cannot_do_to_experts_is_refused(
    keys: dict[str, Any], field: str
) -> None:
    model = shallow("mistralai/Mixtral-8x7B-v0.1")
    card = find_gpu("A100 80GB")

    with pytest.raises(InputError, match="fused experts") as caught:
        simulator.trace(model, recipe(**keys), card)

    assert caught.value.field == field
    assert simulator.trace(model, recipe(targets="attention", **keys), card)


def test_names_that_are_also_those_of_wrapped_layers_are_told_apart() -> None:
    """Gemma 4's vision tower wraps layers that are called as its decoder's are."""
    model = shallow("google/gemma-4-26B-A4B")

    assert simulator.trace(model, recipe(), find_gpu("A100 80GB"))


GENERATIVE = [
    model.architecture.name
    for model in catalog_models()
    if model.architecture.generative
]


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATIVE)
def test_every_causal_language_model_of_the_catalog_traces(name: str) -> None:
    traced = simulator.trace(inspect(name), recipe(), find_gpu("A100 80GB"))

    assert traced.trainable_parameters > 0
    assert traced.log.labels[-1] == "2.optimizer"


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"quantization": "nf4-double", "checkpointing": "full"},
        {"quantization": "int8"},
        {"method": "full", "optimizer": "adafactor"},
        {"padded": True, "checkpointing": "full", "reentrant": True},
        {"trainer": "transformers", "autocast": "bfloat16"},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
@pytest.mark.parametrize("card", ["T4", "L4", "H100"])
def test_every_family_traces_under_other_recipes(
    keys: dict[str, Any], card: str
) -> None:
    families = {inspect(name).model_type: name for name in GENERATIVE}
    for name in families.values():
        assert not unknown_operators(shallow(name), recipe(**keys), card), name
