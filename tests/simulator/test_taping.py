"""Tapes say what the real layers and models do, in any size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import pytest

from memplan import methods
from memplan.architecture import Linear
from memplan.catalog import inspect
from memplan.estimator.polynomials import Sizes, value
from memplan.methods import Flow
from memplan.simulator.events import EventLog
from memplan.simulator.taping import trace_layer, trace_loss, trace_model
from memplan.simulator.taping.polynomials import (
    BATCH,
    LENGTHS,
    ROOMS,
    sizes_in_batch,
)
from memplan.tape import (
    LayerRegime,
    LossRegime,
    Regime,
    Stretch,
    layer_tape,
    loss_tape,
    model_tape,
    to_json,
)

QLORA = LayerRegime(
    method="lora",
    quantization="nf4-double",
    dtype="bfloat16",
    input_dtype="float32",
    autocast="none",
    compute_dtype="bfloat16",
    adapter_dtype="float32",
    input_casts=True,
    dropout=False,
    bias=False,
)

BODY = Regime(
    dtype="bfloat16",
    autocast="none",
    casts_output=False,
    attention="flash",
    masked_attention="efficient",
    padded=False,
    windowed=False,
    trained=False,
    checkpointed=False,
)

LOSS = LossRegime(
    loss="full",
    dtype="bfloat16",
    hidden_dtype="bfloat16",
    autocast="none",
    float32_outputs=False,
    trained=False,
    keeps_output=True,
)

LINEAR = Linear(
    path="up_proj", in_features=2048, out_features=8192, bias=False, kind="mlp"
)


def sizes(tokens: int, rank: int) -> Sizes:
    return Sizes(
        {
            "": 1,
            "N": tokens,
            "i": LINEAR.in_features,
            "o": LINEAR.out_features,
            "r": rank,
        }
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("input_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["lora", "q-bara", "vera"])
def test_a_layer_keeps_what_its_method_s_formula_says(
    method: str, input_dtype: str, dropout: float
) -> None:
    part = methods.find(method)
    options = dict(part.defaults)
    regime = dataclasses.replace(
        QLORA,
        method=method,
        quantization="none",
        dtype=input_dtype,
        input_dtype=input_dtype,
        dropout=dropout > 0,
        options=json.dumps(options) if options else "",
    )
    flow = Flow(
        tokens=640,
        input_bytes=2 if input_dtype == "bfloat16" else 4,
        adapter_bytes=4,
        dropout=dropout,
    )

    kept = trace_layer(regime).kept

    told = part.saved_bytes(LINEAR, 16, flow, options)
    assert sum(value(block, sizes(640, 16)) for block in kept) == told


def test_four_bit_weights_are_dequantised_in_forward_and_in_backward() -> None:
    tape = trace_layer(QLORA)

    dense = 2
    assert max(peak.get("io", 0) for peak in tape.forward.peaks) > dense
    backward = [item for item in tape.backward if isinstance(item, Stretch)]
    peaks = [peak for stretch in backward for peak in stretch.peaks]
    assert max(peak.get("io", 0) for peak in peaks) > dense
    assert tape.holds_input


def test_int8_keeps_its_input_as_long_as_the_graph() -> None:
    assert trace_layer(dataclasses.replace(QLORA, quantization="int8")).sticks


def test_an_adapter_s_gradient_is_scaled_before_a_checkpoint_runs_again() -> None:
    """The product with alpha / r asks for nothing that forward kept."""
    lora, frozen = (
        trace_layer(dataclasses.replace(QLORA, method=name))
        for name in ("lora", "frozen")
    )

    assert lora.ahead == {"No": 4}
    assert frozen.ahead == {}


def test_a_checkpoint_stops_once_backward_has_what_it_asks_for() -> None:
    """The frozen product's output is there then, the sum with the adapter's is not."""
    plain = dataclasses.replace(
        QLORA, quantization="none", adapter_dtype="bfloat16", dropout=False
    )
    tape = trace_layer(plain)
    numbers = sizes(640, 16)

    assert numbers.of(tape.again)[1] < numbers.of(tape.forward)[1]


def test_tapes_are_what_their_files_hold() -> None:
    gpt2 = inspect("openai-community/gpt2")
    layer, body, loss = (
        trace_layer(QLORA),
        trace_model(gpt2, BODY),
        trace_loss(gpt2, LOSS),
    )

    def again(made: object) -> object:
        return json.loads(json.dumps(to_json(made)))

    assert again(layer_tape(again(layer))) == again(layer)  # type: ignore[arg-type]
    assert again(model_tape(again(body))) == again(body)  # type: ignore[arg-type]
    assert again(loss_tape(again(loss))) == again(loss)  # type: ignore[arg-type]


def test_holes_are_the_linear_layers_of_a_block() -> None:
    llama = inspect("meta-llama/Llama-3.2-1B")
    (block,) = llama.blocks

    (tape,) = trace_model(llama, BODY).blocks

    assert tape.holes == tuple(linear.path for linear in block.linears)
    assert all(tape.plain)


def log_of(sizes: Sequence[int], operator: str = "aten.mm.default") -> EventLog:
    log = EventLog()
    for size in sizes:
        log.allocate(size, operator)
    return log


def test_sizes_show_their_powers_of_batch_and_length() -> None:
    batch, (first, second) = BATCH, LENGTHS
    sides = [64 * batch * first, 2 * batch * first**2, 4 * first, 96]
    shorter = [64 * batch * second, 2 * batch * second**2, 4 * second, 96]

    assert sizes_in_batch(log_of(sides), log_of(shorter)) == [
        {"BT": 64},
        {"BTT": 2},
        {"T": 4},
        {"": 96},
    ]


def test_scores_beside_a_sink_are_one_more_for_every_token() -> None:
    length, _ = LENGTHS
    scores = 4 * BATCH * length * (length + 1)

    assert sizes_in_batch(log_of([scores])) == [{"BTT": 4, "BT": 4}]


def test_a_static_cache_has_lengths_of_its_own() -> None:
    (length, _), (room, _), (padded, _) = LENGTHS, ROOMS["L"], ROOMS["P"]
    sizes = [4 * BATCH * length * room, 2 * BATCH * length * padded, 8 * BATCH * room]

    assert sizes_in_batch(log_of(sizes), has_room=True) == [
        {"BTL": 4},
        {"BTP": 2},
        {"BL": 8},
    ]


def test_scratch_by_tiles_grows_with_the_length() -> None:
    tiles, shorter = 1024 * 8192 * BATCH, 512 * 8192 * BATCH

    assert sizes_in_batch(log_of([tiles]), log_of([shorter])) == [{"BT": 8192}]


def test_a_loop_s_blocks_are_shares_of_the_sequence() -> None:
    parts, fewer = 16 * [64 * 8192 * BATCH], 8 * [64 * 8192 * BATCH]

    sizes = sizes_in_batch(log_of(parts), log_of(fewer))

    assert sizes == 16 * [{"BT": 64 * 8192 / 1024}]
