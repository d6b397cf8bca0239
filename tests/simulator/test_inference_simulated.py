"""Inference, traced and real: what is read, what grows, and what it comes to."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from event_logs import events_of
from tiny_models import CONFIGS, CPU, architecture, tiny_recipe

from memplan import inspector
from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.generation import DYNAMIC, GREEDY, SAMPLINGS, STATIC, TOP_K, TOP_P
from memplan.gpu import find_gpu
from memplan.inference import ADAPTERS, MERGED, NONE, SEPARATE, Inference
from memplan.model_source import ModelSource
from memplan.profiler import child
from memplan.profiler.cpu_meter import StorageTracker
from memplan.profiler.task import Journal, Task, read_events
from memplan.recipe import Recipe
from memplan.simulator import inference as simulator_inference
from memplan.simulator import life
from memplan.simulator.cpu import simulate_inference_on_cpu
from memplan.training import model as training_model
from memplan.training.values import materialize

CARD = find_gpu("80GB")
TOKENS = 12
BAR = 0.01
"""How far a simulated peak may be from the bytes of the real tensors."""

LAYERS, HEADS, KV_HEADS, HEAD_DIM, V = 8, 4, 2, 16, 128
LLAMA = {
    "model_type": "llama",
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": V,
}
BATCH, LENGTH = 2, 64


def inspect(**changes: Any) -> Architecture:
    source = ModelSource(name="small", origin="file", config=LLAMA | changes)
    return inspector.inspect(source)


def recipe(**keys: Any) -> Recipe:
    return Recipe(**{"batch_size": BATCH, "sequence_length": LENGTH, "rank": 4} | keys)


def peak_of(footprint: Footprint, label: str) -> int:
    (moment,) = (m for m in footprint.moments if m.label == label)
    return moment.allocated_bytes


def measured(family: str, asked: Recipe, inference: Inference) -> dict[str, int]:
    """Peaks by moment, as the profiler's process reads them on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            model="tiny",
            config=CONFIGS[family] | {"model_type": family},
            recipe=asked,
            device="cpu",
            inference=inference,
            folder=folder,
        )
        file = Path(folder) / "journal.jsonl"
        child.run(task, Journal(file))
        events = list(read_events(file))
    return {e["label"]: e["allocated_bytes"] for e in events if e["event"] == "moment"}


@pytest.mark.parametrize(
    ("family", "adapters", "quantization"),
    [
        ("llama", SEPARATE, "none"),
        ("llama", MERGED, "none"),
        ("llama", NONE, "nf4-double"),
        ("llama", SEPARATE, "nf4-double"),
        ("gpt2", SEPARATE, "none"),
        ("gemma2", SEPARATE, "none"),
        ("gemma2", NONE, "int8"),
        ("phi", MERGED, "none"),
        ("mixtral", NONE, "none"),
    ],
)
def test_simulated_answers_take_what_real_ones_do(
    family: str, adapters: str, quantization: str
) -> None:
    asked = tiny_recipe(dtype="float32", quantization=quantization, sequence_length=32)
    inference = Inference(num_tokens=TOKENS, adapters=adapters)

    simulated = simulate_inference_on_cpu(architecture(family), asked, inference)

    real = measured(family, asked, inference)
    assert real.keys() == {moment.label for moment in simulated.moments}
    for label in ("prefill", "decode"):
        assert peak_of(simulated, label) == pytest.approx(real[label], rel=BAR)


DRAWN: dict[str, dict[str, Any]] = {
    GREEDY: {"do_sample": False},
    TOP_K: {"do_sample": True},
    TOP_P: {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
}
"""What `generate` is told of how tokens are chosen."""


@pytest.mark.parametrize(
    ("family", "sampling", "cache"),
    [
        ("llama", GREEDY, DYNAMIC),
        ("gemma2", GREEDY, DYNAMIC),
        ("gpt2", GREEDY, DYNAMIC),
        ("llama", TOP_K, DYNAMIC),
        ("llama", TOP_P, DYNAMIC),
        ("gpt2", TOP_P, DYNAMIC),
        ("llama", GREEDY, STATIC),
        ("gemma2", GREEDY, STATIC),
        ("gpt2", TOP_P, STATIC),
    ],
)
def test_simulated_answers_take_what_generate_does(
    family: str, sampling: str, cache: str
) -> None:
    asked = tiny_recipe(dtype="float32", sequence_length=32)
    model: Any = training_model.build(architecture(family), asked)
    model = materialize(model, asked, CPU).eval()
    prompts = torch.ones(asked.batch_size, asked.sequence_length, dtype=torch.long)
    with StorageTracker("cpu") as tracker:
        tracker.see([*model.parameters(), *model.buffers(), prompts])
        tracker.reset()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            use_cache=True,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
            **DRAWN[sampling],
        )

    simulated = simulate_inference_on_cpu(
        architecture(family),
        asked,
        Inference(num_tokens=TOKENS, adapters=NONE, sampling=sampling, cache=cache),
    )

    assert simulated.peak.allocated_bytes == pytest.approx(tracker.peak_bytes, rel=BAR)


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_layers_that_repeat_do_so_in_inference(adapters: str) -> None:
    model = inspect(num_hidden_layers=12)
    inference = Inference(num_tokens=TOKENS, adapters=adapters)

    few, whole = (
        simulator_inference.trace(model, recipe(), inference, CARD, whole=each)
        for each in (False, True)
    )

    assert few.num_traced_layers is not None
    assert whole.num_traced_layers is None
    for label in ("load", "prefill", "decode"):
        assert [*events_of(few.log, label)] == [*events_of(whole.log, label)]
    assert few.log.categories == whole.log.categories


def test_keys_and_values_grow_by_batch_length_and_heads() -> None:
    simulation = simulator_inference.run(inspect(), recipe(), Inference(num_tokens=70))

    prefill, decode = simulation.footprint.moments[-2:]
    each = 2 * BATCH * KV_HEADS * HEAD_DIM * 2
    assert prefill.breakdown["kv_cache"] >= LAYERS * each * LENGTH
    assert decode.breakdown["kv_cache"] >= LAYERS * each * (LENGTH + 68)
    assert decode.breakdown["kv_cache"] <= (LAYERS + 1) * each * (LENGTH + 70) * 1.1


def test_a_static_cache_has_room_for_all_tokens_but_the_last_from_the_first() -> None:
    asked = Inference(num_tokens=70, cache=STATIC)
    simulation = simulator_inference.run(inspect(), recipe(), asked)

    prefill, decode = simulation.footprint.moments[-2:]
    each = BATCH * KV_HEADS * HEAD_DIM * 2 * (LENGTH + 70 - 1)
    block = 512
    counter = block
    room = LAYERS * (2 * math.ceil(each / block) * block + counter)
    for moment in (prefill, decode):
        assert moment.breakdown["kv_cache"] == room
    assert any("disable_compile" in note for note in simulation.footprint.notes)


@pytest.mark.parametrize("window", [None, 40])
def test_tokens_that_are_left_out_of_a_static_cache_change_nothing(
    window: int | None,
) -> None:
    """All are run where the simulation is told that a layer is of no known kind."""
    kind = {"model_type": "mistral", "sliding_window": window} if window else {}
    model = inspect(**kind)
    asked = Inference(num_tokens=30, cache=STATIC, adapters=NONE)

    few = simulator_inference.run(model, recipe(), asked).footprint
    with mock.patch.object(life, "STATIC_LAYERS", ()):
        every = simulator_inference.run(model, recipe(), asked).footprint

    assert few.peak.allocated_bytes == every.peak.allocated_bytes
    assert few.moments[-1].breakdown == every.moments[-1].breakdown


def test_the_peak_is_generations_and_the_parts_sum_to_the_device() -> None:
    simulation = simulator_inference.run(
        inspect(), recipe(), Inference(num_tokens=4), CARD
    )

    footprint = simulation.footprint
    assert footprint.peak.label in ("prefill", "decode")
    device = footprint.device_bytes(footprint.peak)
    assert sum(footprint.breakdown.values()) == device
    assert footprint.breakdown["kv_cache"] > 0
    assert footprint.breakdown["gradients"] == footprint.breakdown["optimizer"] == 0


def test_merged_adapters_are_gone_and_full_tuning_has_none() -> None:
    merged, alone, full = (
        simulator_inference.run(inspect(), recipe(**keys), Inference(adapters=adapters))
        for keys, adapters in (
            ({}, MERGED),
            ({}, NONE),
            ({"method": "full"}, SEPARATE),
        )
    )

    assert merged.footprint.peak.breakdown.get("adapters", 0) == 0
    assert merged.footprint.peak.allocated_bytes == pytest.approx(
        alone.footprint.peak.allocated_bytes, rel=BAR
    )
    assert full.footprint.moments == alone.footprint.moments


def test_more_tokens_than_positions_are_refused() -> None:
    gpt2 = architecture("gpt2")

    with pytest.raises(InputError, match="at most 48"):
        simulator_inference.run(gpt2, tiny_recipe(), Inference(num_tokens=49))


def test_what_is_drawn_is_chosen_by_several_copies_of_the_logits() -> None:
    """Many short prompts, of which the scores of a token are the most.

    Bytes of a score: its copies in the model's precision and in float32, where they
    are drawn from masks, positions of a sort and its scratch, and random numbers.
    """
    rows, vocabulary = 64, 16_384
    short = recipe(batch_size=rows, sequence_length=2, method="full")
    model = inspect(vocab_size=vocabulary)
    each = {GREEDY: 2 + 4 + 4, TOP_K: 2 + 4 + 8 + 5, TOP_P: 2 + 4 + 8 + 4 + 12 + 28}

    peaks = {
        sampling: peak_of(
            simulator_inference.run(
                model, short, Inference(num_tokens=4, sampling=sampling), CARD
            ).footprint,
            "decode",
        )
        for sampling in SAMPLINGS
    }

    for sampling in (TOP_K, TOP_P):
        added = rows * vocabulary * (each[sampling] - each[GREEDY])
        assert peaks[sampling] - peaks[GREEDY] == pytest.approx(added, rel=0.02)
