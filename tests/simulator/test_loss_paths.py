"""What each way to the loss holds of the logits, worked out by hand.

B = 2 sequences of T = 385 tokens, hidden states of width H = 64, V = 1000 words; all in
bfloat16 on an A100, whose first product needs a workspace of 8,519,680 bytes.
"""

from __future__ import annotations

import functools
from collections import Counter
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

TOKENS = 2 * 385
LABELS = 2 * 384
WIDTH = 64
WORDS = 1000
HALF, FLOAT = 2, 4


@functools.cache
def architecture() -> Architecture:
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": WORDS,
    }
    return inspect(ModelSource(name="tiny", origin="file", config=config))


@functools.cache
def log_of(loss: str, gpu: str = "A100 80GB", **keys: Any) -> EventLog:
    recipe = Recipe(
        loss=loss,
        rank=4,
        batch_size=2,
        sequence_length=385,
        keep_outputs="none",
        **keys,
    )
    return trace(architecture(), recipe, find_gpu(gpu)).log


def logits(log: EventLog, label: str) -> Counter[int]:
    """Sizes of the blocks of logits that a moment allocates."""
    return Counter(
        size
        for block, size in events_of(log, label)
        if block >= 0 and size != FREE and log.categories[block] == "logits"
    )


def made_as_large_as_the_head(log: EventLog, label: str) -> list[str]:
    """The operators that make blocks of the size of the head's weight in a moment."""
    return [
        log.operators[block]
        for block, size in events_of(log, label)
        if block >= 0 and size == WORDS * WIDTH * HALF
    ]


def most_logits(log: EventLog) -> int:
    """The most bytes of logits at any time."""
    held = most = 0
    for block, size in log.events:
        if block >= 0 and log.categories[block] == "logits":
            held += -log.sizes[block] if size == FREE else size
            most = max(most, held)
    return most


def test_full_holds_three_matrices_in_float32() -> None:
    # In backward: the logarithms of probabilities and two gradients.
    assert most_logits(log_of("full")) == 3 * TOKENS * WORDS * FLOAT


def test_checkpointed_chunks_hold_the_logits_of_256_tokens() -> None:
    log = log_of("chunked-nll")
    chunk = 256 * WORDS

    assert set(logits(log, "2.forward")) == {chunk * HALF, chunk * FLOAT}
    assert logits(log, "2.forward")[chunk * HALF] == LABELS // 256
    assert logits(log, "2.backward")[chunk * HALF] == 2 * (LABELS // 256)
    assert most_logits(log) <= 6 * chunk * FLOAT


def test_liger_holds_one_buffer_in_forward_and_none_in_backward() -> None:
    # ceil(1000 / 64) = 16 parts of 770 tokens are 49: 64 is the next power of two.
    log = log_of("liger")

    assert logits(log, "2.forward") == {64 * WORDS * HALF: 1}
    assert not logits(log, "2.backward")


@pytest.mark.parametrize("loss", ["liger", "cut"])
def test_frozen_head_has_no_gradient(loss: str) -> None:
    log = log_of(loss)

    for label in ("2.forward", "2.backward"):
        assert "aten.zeros_like.default" not in made_as_large_as_the_head(log, label)


@pytest.mark.parametrize(
    ("loss", "label"), [("liger", "2.forward"), ("cut", "2.backward")]
)
def test_trained_head_has_one_from_the_pass_that_makes_it(
    loss: str, label: str
) -> None:
    made = made_as_large_as_the_head(log_of(loss, method="full"), label)

    assert made.count("aten.zeros_like.default") == 1


def test_older_cards_sum_liger_s_gradient_by_whole_copies() -> None:
    # 13 chunks of at most 64 tokens, each with a product and its copy in float32.
    log = log_of("liger", "T4", method="full")
    sizes = Counter(size for block, size in events_of(log, "2.forward") if block >= 0)

    assert sizes[WORDS * WIDTH * FLOAT] == 13


def test_cut_makes_no_logits() -> None:
    log = log_of("cut")

    assert most_logits(log) == 0
    sums = [n for block, n in events_of(log, "2.forward") if n == LABELS * FLOAT]
    assert len(sums) == 2


def test_chunks_of_logits_are_kept_in_half_precision() -> None:
    # Seven chunks of 49 tokens a sequence and one of 42. Backward has the gradients of
    # all logits before it goes on, each in the place of its chunk but for the newest.
    log = log_of("chunked-logits")
    long, short = (2 * tokens * WORDS * HALF for tokens in (49, 42))

    assert logits(log, "2.forward") == {long: 7, short: 1}
    assert most_logits(log) == TOKENS * WORDS * HALF + long
