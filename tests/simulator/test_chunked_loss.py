"""TRL's fused head as a card would run it, worked out by hand.

Source: trl.kernels.chunked_logprob, `ChunkedLogProbFunction`, and trl.trainer.utils,
`add_fused_lm_head`. N labels, hidden states of width h = 64 in e bytes, V tokens in the
vocabulary, products in c bytes. The buffer of products is min(N, 4096) x 32768 x c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from event_logs import events_of

from memplan.architecture import Architecture
from memplan.gpu import find_gpu
from memplan.inspector import inspect
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.simulator import trace
from memplan.simulator.events import FREE, EventLog

pytest.importorskip("trl")

BUFFER = "aten.empty.memory_format"
PICKED = "aten.index.Tensor"
CAST = "aten._to_copy.default"
ZEROS = "aten.zeros.default"

WIDTH = 64
LABELS = 32
"""2 sequences of 17 tokens: the first of each predicts nothing."""


@dataclass(frozen=True)
class Block:
    operator: str
    num_bytes: int
    survives: bool
    """Whether it lives on when the phase is over."""


@dataclass(frozen=True)
class Phase:
    blocks: tuple[Block, ...]
    peak_bytes: int
    """The most that these blocks took at once."""

    def made_by(self, *operators: str) -> list[tuple[str, int]]:
        return [
            (b.operator, b.num_bytes) for b in self.blocks if b.operator in operators
        ]

    def survivors(self) -> list[int]:
        return [block.num_bytes for block in self.blocks if block.survives]


def architecture(vocab_size: int = 128) -> Architecture:
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
    }
    return inspect(ModelSource(name="tiny/llama", origin="file", config=config))


def traced(vocab_size: int = 128, **keys: Any) -> tuple[Phase, Phase]:
    """What the head does in the first forward and backward.

    Kernels' own scratch and single numbers are left out.
    """
    recipe = Recipe(
        **{"trainer": "trl", "batch_size": 2, "sequence_length": 17, "rank": 4} | keys
    )
    log = trace(architecture(vocab_size), recipe, find_gpu("A100-80GB")).log
    forward = list(events_of(log, "1.forward"))
    backward = list(events_of(log, "1.backward"))
    mask = births(log, forward, "aten.ne.Scalar")[-1]
    end = births(log, backward, "aten.slice_backward.default")[0]
    return phase_of(log, forward[mask:]), phase_of(log, backward[:end])


def births(log: EventLog, events: list[tuple[int, int]], operator: str) -> list[int]:
    """The positions of what an operator allocates."""
    return [
        position
        for position, (block, value) in enumerate(events)
        if value != FREE and log.operators[block] == operator
    ]


def phase_of(log: EventLog, events: list[tuple[int, int]]) -> Phase:
    freed = {block for block, value in events if value == FREE}
    counted = [
        block
        for block, value in events
        if value > 8 and log.categories[block] != "workspace"
    ]
    live = peak = 0
    for block, value in events:
        if block in counted:
            live += -log.sizes[block] if value == FREE else value
            peak = max(peak, live)
    blocks = tuple(
        Block(log.operators[block], log.sizes[block], block not in freed)
        for block in counted
    )
    return Phase(blocks, peak)


VECTOR = 4 * LABELS


@pytest.fixture(scope="module")
def half() -> tuple[Phase, Phase]:
    """LoRA on weights in bfloat16, under autocast in bfloat16: e = c = 2."""
    return traced()


def test_forward_picks_scored_tokens_then_multiplies_into_one_buffer(
    half: tuple[Phase, Phase],
) -> None:
    """Hidden states, targets, seven vectors of statistics; nothing is cast."""
    forward, _ = half

    assert forward.made_by(PICKED, "aten.full.default", ZEROS, BUFFER, CAST) == [
        (PICKED, LABELS * WIDTH * 2),
        (PICKED, LABELS * 8),
        ("aten.full.default", VECTOR),
        *[(ZEROS, VECTOR)] * 4,
        ("aten.full.default", VECTOR),
        (ZEROS, VECTOR),
        (BUFFER, LABELS * 32768 * 2),
    ]


def test_no_logits_are_made(half: tuple[Phase, Phase]) -> None:
    """Beside the buffer nothing is as large as the hidden states that are picked."""
    forward, _ = half

    assert sorted(block.num_bytes for block in forward.blocks)[-2:] == [4096, 2 << 20]


def test_forward_peak_is_at_its_end_with_the_buffer_still_held(
    half: tuple[Phase, Phase],
) -> None:
    """Mask, picked states, targets, statistics, buffer.

    Then log Z, log p, and the entropy beside the quotient that it is made of.
    """
    forward, _ = half

    assert forward.peak_bytes == sum([32, 4096, 256, 7 * VECTOR, 2 << 20, 4 * VECTOR])


def test_hidden_states_targets_and_two_vectors_are_kept_for_backward(
    half: tuple[Phase, Phase],
) -> None:
    """The mask, too, by which they were picked; metrics are gone with the outputs."""
    forward, _ = half

    assert sorted(forward.survivors()) == [32, VECTOR, VECTOR, 256, 4096]


def test_backward_gathers_the_gradient_in_float32(half: tuple[Phase, Phase]) -> None:
    """4 N h, the buffer again, then the gradient in the precision of the states."""
    _, backward = half

    assert backward.made_by(ZEROS, BUFFER, CAST) == [
        (ZEROS, LABELS * WIDTH * 4),
        (BUFFER, LABELS * 32768 * 2),
        (CAST, LABELS * WIDTH * 2),
    ]
    assert backward.peak_bytes == sum([VECTOR, 8192, 2 << 20, 4096])


def test_gradient_of_picking_is_added_in_place(half: tuple[Phase, Phase]) -> None:
    """Zeros for every position, into which the sort-based kernel adds."""
    _, backward = half

    after = [block.operator for block in backward.blocks]
    after = after[after.index(CAST) + 1 :]
    assert after == ["aten.new_zeros.default"]
    assert backward.blocks[-1].num_bytes == LABELS * WIDTH * 2


def test_single_precision_weights_are_cast_tile_by_tile() -> None:
    """Under autocast in bfloat16: e = 4, c = 2, and a head in float32.

    Each tile of hidden states and of the vocabulary is cast, in backward again; the
    gradient is in float32 already.
    """
    forward, backward = traced(dtype="float32")

    assert forward.made_by(PICKED, BUFFER, CAST) == [
        (PICKED, LABELS * WIDTH * 4),
        (PICKED, LABELS * 8),
        (BUFFER, LABELS * 32768 * 2),
        (CAST, LABELS * WIDTH * 2),
        (CAST, 128 * WIDTH * 2),
    ]
    assert backward.made_by(ZEROS, BUFFER, CAST) == [
        (ZEROS, LABELS * WIDTH * 4),
        (BUFFER, LABELS * 32768 * 2),
        (CAST, LABELS * WIDTH * 2),
        (CAST, 128 * WIDTH * 2),
    ]
    assert backward.peak_bytes == sum([VECTOR, 8192, 2 << 20, 4096, 16384])


def test_without_autocast_products_are_in_the_model_s_precision() -> None:
    forward, backward = traced(dtype="float32", autocast="none")

    assert forward.made_by(BUFFER, CAST) == [(BUFFER, LABELS * 32768 * 4)]
    assert backward.made_by(BUFFER, CAST) == [(BUFFER, LABELS * 32768 * 4)]


def test_a_large_vocabulary_takes_tiles_of_32768() -> None:
    """40,000 tokens are one tile and 7,232 more, in the one buffer.

    Forward drops a tile's cast weight as soon as it is multiplied.
    """
    forward, backward = traced(vocab_size=40_000, dtype="float32")

    for phase in (forward, backward):
        assert phase.made_by(BUFFER) == [(BUFFER, LABELS * 32768 * 2)]
        assert phase.made_by(CAST)[1:] == [
            (CAST, 32768 * WIDTH * 2),
            (CAST, 7232 * WIDTH * 2),
        ]
    assert forward.peak_bytes == sum(
        [32, 8192, 256, 7 * VECTOR, 2 << 20, 4096, 32768 * WIDTH * 2]
    )
    # Backward has a name for the tile of the weight, which holds one until the next.
    assert backward.peak_bytes == sum(
        [VECTOR, 8192, 2 << 20, 4096, 32768 * WIDTH * 2, 7232 * WIDTH * 2]
    )


def test_more_than_4096_labels_share_the_buffer() -> None:
    """2 x 2050 labels: a tile of 4096 and one of 4."""
    forward, backward = traced(sequence_length=2051)

    for phase in (forward, backward):
        assert phase.made_by(BUFFER) == [(BUFFER, 4096 * 32768 * 2)]
    assert forward.made_by(PICKED)[0] == (PICKED, 4100 * WIDTH * 2)
    assert backward.made_by(ZEROS) == [(ZEROS, 4100 * WIDTH * 4)]


def test_a_trained_head_gathers_its_gradient_in_float32_too() -> None:
    """4 V h and, while it lives, the gradient in the weight's precision."""
    _, backward = traced(method="full", vocab_size=1000)

    assert backward.made_by(ZEROS, BUFFER, CAST) == [
        (ZEROS, LABELS * WIDTH * 4),
        (ZEROS, 1000 * WIDTH * 4),
        (BUFFER, LABELS * 32768 * 2),
        (CAST, LABELS * WIDTH * 2),
        (CAST, 1000 * WIDTH * 2),
    ]
    assert backward.peak_bytes == sum([VECTOR, 8192, 256_000, 2 << 20, 4096, 128_000])


def test_checkpointing_does_not_touch_the_head(half: tuple[Phase, Phase]) -> None:
    forward, backward = traced(checkpointing="full")

    assert (forward, backward) == half
