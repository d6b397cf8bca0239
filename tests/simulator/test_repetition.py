"""Few layers stand for many: the log is the same as if every layer were traced."""

from __future__ import annotations

import dataclasses

import pytest

from memplan import simulator
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator.events import FREE, EventLog
from memplan.simulator.pattern import Pattern, Section, find_pattern
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
    # Five layers that slide and one that does not, beside a vision tower.
    (
        "google/gemma-3-12b-pt",
        {"quantization": "nf4-double", "checkpointing": "full"},
    ),
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


def assert_logs_equal(architecture: Architecture, recipe: Recipe) -> None:
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


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_the_log_equals_that_of_the_whole_model(
    name: str, keys: dict[str, object]
) -> None:
    assert_logs_equal(inspect(name), Recipe.from_mapping(keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"rank_pattern": {r"layers\.([0-9]|10)\..*": 4}},
        {"rank_pattern": {r"layers\.\d*[02468]\.self_attn\.q_proj": 4}},
        {
            "rank_pattern": {f"layers.{n}.mlp.up_proj": 8 + n % 2 for n in range(22)},
            "alpha_pattern": {f"layers.{n}.mlp.up_proj": 3.0 for n in range(22)},
        },
        {"checkpointing": "full", "every_n_layers": 2, "quantization": "nf4-double"},
        {"targets": [f"layers.{n}.self_attn.v_proj" for n in range(12)]},
        {
            "targets": [f"layers.{n}.mlp.up_proj" for n in range(11, 22)],
            "checkpointing": "full",
            "autocast": "bfloat16",
        },
        {"targets": [f"layers.{n}.mlp.up_proj" for n in range(0, 22, 2)]},
        {"trained_modules": [f"layers.{n}.input_layernorm" for n in range(22)]},
        {
            "quantization": "nf4",
            "unquantized_modules": [rf"model.layers.{n}.mlp" for n in range(11)],
        },
    ],
)
def test_names_for_layers_make_kinds_of_layers(keys: dict[str, object]) -> None:
    llama = inspect("TinyLlama/TinyLlama-1.1B-Chat-v1.0")

    assert_logs_equal(llama, Recipe.from_mapping(keys))


def test_layers_of_one_kind_are_traced_at_both_ends_and_twice() -> None:
    pattern = pattern_of(inspect("meta-llama/Llama-2-7b-hf"), Recipe())

    assert pattern.kept == (0, 1, 2, 3, 30, 31)
    assert pattern.representatives == (0, 1, *[2] * 28, 4, 5)


def test_alternating_layers_have_a_period_of_two() -> None:
    pattern = pattern_of(inspect("google/gemma-2-2b"), Recipe())

    assert pattern.sections == (Section(start=0, period=2, num_periods=13),)
    for layer, position in enumerate(pattern.representatives):
        assert (pattern.kept[position] - layer) % 2 == 0


def test_a_dense_first_layer_stands_for_itself() -> None:
    pattern = pattern_of(inspect("deepseek-ai/DeepSeek-V2-Lite"), Recipe())

    assert pattern.sections == (Section(start=1, period=1, num_periods=26),)


def test_halves_are_two_sections() -> None:
    recipe = Recipe(rank_pattern={r"layers\.([0-9]|1[0-5])\..*": 4})
    pattern = pattern_of(inspect("meta-llama/Llama-2-7b-hf"), recipe)

    assert [section.start for section in pattern.sections] == [0, 16]
    assert len(pattern.kept) == 12


def test_a_layer_that_is_named_alone_stands_for_itself() -> None:
    recipe = Recipe(rank_pattern={"layers.3.self_attn.q_proj": 4})
    pattern = pattern_of(inspect("meta-llama/Llama-2-7b-hf"), recipe)

    assert pattern.kept[:4] == (0, 1, 2, 3)
    assert [section.start for section in pattern.sections] == [4]


def test_layers_that_all_differ_are_traced_whole() -> None:
    ranks = {f"layers.{n}.self_attn.q_proj": n + 1 for n in range(32)}
    recipe = Recipe(rank_pattern=ranks)

    assert find_pattern(inspect("meta-llama/Llama-2-7b-hf"), recipe) is None


def test_a_name_that_matches_nothing_is_refused_as_of_the_whole_model() -> None:
    llama = inspect("TinyLlama/TinyLlama-1.1B-Chat-v1.0")

    with pytest.raises(InputError, match=r"layers\.22"):
        simulator.trace(llama, Recipe(rank_pattern={"layers.22.mlp": 4}), CARD)


def test_a_shallow_model_is_traced_whole() -> None:
    llama = inspect("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    (block,) = llama.blocks
    shallow = dataclasses.replace(
        llama, blocks=(dataclasses.replace(block, layers=tuple(range(6))),)
    )
    assert find_pattern(shallow, Recipe()) is None
