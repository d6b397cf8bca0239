"""The order of a load's events, worked out by hand for a model of one layer."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from storage_meter import StorageMeter
from torch import nn
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D

from memplan import inspector
from memplan.architecture import Architecture
from memplan.gpu import find_gpu
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.simulator.events import FREE, EventLog
from memplan.simulator.load import Loader
from memplan.simulator.trace import Tracer
from memplan.training.model import build

H, FFN, V = 256, 512, 1000
CONFIG = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": V,
    "tie_word_embeddings": False,
}
NORMS = 2 * H * 2 + H * 2  # three norms of H numbers in 16 bits
LINEARS = 4 * H * H + 3 * H * FFN
BUFFERS = 2 * (H // 4 // 2) * 4  # inv_freq and its original, float32


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    source = ModelSource(name="one-layer", origin="file", config=CONFIG)
    return inspector.inspect(source)


def load(architecture: Architecture, quantization: str) -> EventLog:
    recipe = Recipe(quantization=quantization)
    log = EventLog()
    log.begin("load")
    tracer = Tracer(find_gpu("T4"), log, padded=False)
    model = build(architecture, recipe)
    Loader(tracer, recipe).load(model)
    tracer.stop()
    return log


def live_bytes(log: EventLog) -> int:
    live: dict[int, int] = {}
    for block, num_bytes in log.events[1:]:
        if num_bytes == FREE:
            del live[block]
        else:
            live[block] = num_bytes
    return sum(live.values())


def test_an_unquantised_model_moves_module_by_module(
    architecture: Architecture,
) -> None:
    log = load(architecture, "none")

    assert live_bytes(log) == 2 * (LINEARS + 2 * V * H) + NORMS + BUFFERS
    assert FREE not in [num_bytes for _, num_bytes in log.events[1:]]
    assert list(dict.fromkeys(log.modules))[:5] == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj",
    ]
    assert log.modules[-1] == "lm_head"


def test_a_quantised_model_arrives_in_natural_order(architecture: Architecture) -> None:
    log = load(architecture, "nf4")

    paths = [path for path in dict.fromkeys(log.modules) if path]
    assert paths[:6] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.input_layernorm",
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]


def test_nf4_holds_codes_absmax_and_a_table(architecture: Architecture) -> None:
    # 4 bits a weight, 4 bytes per 64 weights, 64 for the code of each of 7 layers.
    stored = LINEARS // 2 + LINEARS // 64 * 4 + 7 * 64
    log = load(architecture, "nf4")

    assert live_bytes(log) == stored + 2 * 2 * V * H + NORMS + BUFFERS


def test_double_quantisation_holds_absmax_in_bytes(architecture: Architecture) -> None:
    # A byte per 64 weights, 4 per 64 * 256, and for each layer: code 64, offset 4,
    # nested code 1024; the process keeps the map of 8-bit values, 1024.
    blocks = LINEARS // 64
    stored = LINEARS // 2 + blocks + blocks // 256 * 4 + 7 * (64 + 4 + 1024) + 1024
    log = load(architecture, "nf4-double")

    assert live_bytes(log) == stored + 2 * 2 * V * H + NORMS + BUFFERS


def test_int8_holds_a_scale_for_each_row(architecture: Architecture) -> None:
    rows = 4 * H + 2 * FFN + H
    log = load(architecture, "int8")

    assert live_bytes(log) == LINEARS + 4 * rows + 2 * 2 * V * H + NORMS + BUFFERS


def test_the_warm_up_block_is_as_large_as_the_stored_weights(
    architecture: Architecture,
) -> None:
    log = load(architecture, "nf4")

    block, num_bytes = log.events[1]
    assert log.events[2] == (block, FREE)
    assert num_bytes == LINEARS // 2 + 2 * 2 * V * H + NORMS


def test_a_weight_is_quantised_beside_its_16_bit_copy(
    architecture: Architecture,
) -> None:
    log = load(architecture, "nf4")
    down = "model.layers.0.mlp.down_proj"
    events = [(b, n) for b, n in log.events if b >= 0 and log.modules[b] == down]

    weights = H * FFN
    full = events[0][0]
    assert [n for _, n in events if n != FREE] == [
        2 * weights,  # the 16-bit copy
        weights // 64 * 4,  # absmax
        weights // 2,  # codes
        64,  # the code's 16 values
        4,
        4,
    ]
    assert events[-1] == (full, FREE)


def test_a_weight_in_columns_is_copied_into_rows_first() -> None:
    config = {"model_type": "gpt2", "n_embd": H, "n_layer": 1, "n_head": 4}
    source = ModelSource(name="one-layer", origin="file", config=config)
    log = load(inspector.inspect(source), "nf4")
    path = "transformer.h.0.mlp.c_fc"
    events = [(b, n) for b, n in log.events if b >= 0 and log.modules[b] == path]

    weights = H * 4 * H
    (bias, _), (full, full_bytes), (copy, copy_bytes), *_ = events
    assert (full_bytes, copy_bytes) == (2 * weights, 2 * weights)
    assert log.sizes[bias] == 2 * 4 * H
    assert events[-2:] == [(copy, FREE), (full, FREE)]


@pytest.mark.parametrize(("kind", "num_copies"), [(Conv1D, 1), (nn.Linear, 0)])
def test_transformers_copies_what_is_held_in_columns(
    kind: type[nn.Module], num_copies: int
) -> None:
    model = nn.Module()
    model.layer = Linear4bit(H, FFN, bias=False, quant_type="nf4", device="meta")
    model.layer.source_cls = kind
    model.get_parameter_or_buffer = model.get_parameter
    shape = (H, FFN) if kind is Conv1D else (FFN, H)
    weight = torch.ones(shape, dtype=torch.bfloat16)

    with StorageMeter() as meter:
        Bnb4bitQuantize(None).convert({"layer.weight": [weight]}, model=model)

    assert meter.births.count(2 * H * FFN) == num_copies
