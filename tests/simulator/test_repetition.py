"""Few layers stand for many: the log is the same as if every layer were traced."""

from __future__ import annotations

import dataclasses

import pytest

from memplan import simulator
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator.events import FREE, EventLog
from memplan.simulator.pattern import Pattern, find_pattern
from memplan.simulator.replay import replay

CARD = find_gpu("A100-80GB")

CASES = [
    (
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        {"quantization": "nf4-double", "checkpointing": "full"},
    ),
    (
        "Qwen/Qwen2.5-0.5B",
        {"autocast": "bfloat16", "dropout": 0.1, "max_grad_norm": 1.0},
    ),
    ("google/gemma-2-2b", {"attention": "eager"}),
    ("deepseek-ai/DeepSeek-V2-Lite", {"checkpointing": "full"}),
    ("facebook/opt-1.3b", {"method": "full", "optimizer": "adafactor"}),
    (
        "tiiuae/falcon-7b",
        {"quantization": "int8", "checkpointing": "full", "reentrant": True},
    ),
    ("EleutherAI/pythia-410m", {"method": "dora", "accumulation": 2}),
    ("mistralai/Mixtral-8x7B-v0.1", {"optimizer": "adamw-fused"}),
    (
        "openai-community/gpt2",
        {"method": "full", "dtype": "float32", "max_grad_norm": 1.0},
    ),
    (
        "EleutherAI/pythia-160m",
        {"optimizer": "paged-adamw-8bit", "keep_outputs": "step", "padded": True},
    ),
]


def canonical(log: EventLog) -> list[object]:
    """Events by order of allocation; releases in one go have no order among them."""
    numbers: dict[int, int] = {}
    events: list[object] = []
    released: list[int] = []
    for block, num_bytes in log.events:
        if block >= 0 and num_bytes == FREE:
            released.append(numbers[block])
            continue
        events.append(tuple(sorted(released)))
        released = []
        if block < 0:
            events.append((block, num_bytes))
            continue
        numbers[block] = len(numbers)
        events.append((num_bytes, log.categories[block], log.modules[block]))
    return [*events, tuple(sorted(released))]


def pattern_of(architecture: Architecture, recipe: Recipe) -> Pattern:
    pattern = find_pattern(architecture, recipe)
    assert pattern is not None
    assert len(pattern.kept) < pattern.num_layers
    return pattern


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_the_log_equals_that_of_the_whole_model(
    name: str, keys: dict[str, object]
) -> None:
    architecture, recipe = inspect(name), Recipe.from_mapping(keys)
    pattern = pattern_of(architecture, recipe)

    whole = simulator.trace(architecture, recipe, CARD, whole=True)
    short = simulator.trace(architecture, recipe, CARD)

    assert short.num_traced_layers == len(pattern.kept)
    assert canonical(short.log) == canonical(whole.log)
    assert short.trainable_parameters == whole.trainable_parameters
    assert short.paged_bytes == whole.paged_bytes
    settings = AllocatorSettings()
    moments = replay(whole.log, settings, None).moments
    assert replay(short.log, settings, None).moments == moments


def test_layers_of_one_kind_have_a_period_of_one() -> None:
    pattern = pattern_of(inspect("meta-llama/Llama-2-7b-hf"), Recipe())

    assert (pattern.head, pattern.period) == (0, 1)
    assert pattern.kept == (0, 1, 2, 3, 30, 31)
    stand_ins = [pattern.representative(layer) for layer in range(32)]
    assert stand_ins == [0, 1, 2, *[2] * 27, 4, 5]


def test_alternating_layers_have_a_period_of_two() -> None:
    pattern = pattern_of(inspect("google/gemma-2-2b"), Recipe())

    assert (pattern.head, pattern.period) == (0, 2)
    for layer in range(26):
        assert (pattern.layer_of(pattern.representative(layer)) - layer) % 2 == 0


def test_a_dense_first_layer_is_the_head() -> None:
    pattern = pattern_of(inspect("deepseek-ai/DeepSeek-V2-Lite"), Recipe())

    assert (pattern.head, pattern.period) == (1, 1)


@pytest.mark.parametrize(
    "keys",
    [
        {"rank_pattern": {"layers.3.self_attn.q_proj": 4}},
        {"checkpointing": "full", "every_n_layers": 2},
        {"targets": ["model.layers.0.self_attn.q_proj"]},
    ],
)
def test_recipes_that_tell_layers_apart_are_traced_whole(
    keys: dict[str, object],
) -> None:
    llama = inspect("meta-llama/Llama-2-7b-hf")
    assert find_pattern(llama, Recipe.from_mapping(keys)) is None


def test_a_shallow_model_is_traced_whole() -> None:
    llama = inspect("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    (block,) = llama.blocks
    shallow = dataclasses.replace(
        llama, blocks=(dataclasses.replace(block, layers=tuple(range(6))),)
    )
    assert find_pattern(shallow, Recipe()) is None
