"""What choosing the next token takes: B V logits, and what is made of them.

Bytes are those of a float32 logit's worth of tensors at once, in the order in which
transformers' `_sample` (generation/utils.py) and its processors (logits_process.py)
make them; b is the size of a number of the model's. What was made for the last token is
held by names until it is made for the next.
"""

from __future__ import annotations

from memplan.generation import GREEDY, TOP_P
from memplan.sorting import POSITION_BYTES, scratch_blocks

FLOAT, BOOLEAN = 4, 1
"""Bytes of a score, and of whether it is left out."""

KEPT = {GREEDY: FLOAT}
"""Of a token's logits while the next are computed; else logits, scores, and shares."""


def kept_bytes(sampling: str, batch: int, vocabulary: int) -> int:
    """4 B V, or 12 B V: what is left of a token while the next is computed."""
    return KEPT.get(sampling, 3 * FLOAT) * batch * vocabulary


def choosing_bytes(
    sampling: str, batch: int, vocabulary: int, item: int, *, later: bool
) -> int:
    """The most from the last token's logits on: max of its stages.

    `later`: whether a token was chosen before, of which scores and shares are held.
    """
    count = batch * vocabulary
    old = kept_bytes(sampling, batch, vocabulary) if later else 0
    copied = (item + FLOAT) * count
    if sampling == GREEDY:
        return copied + old
    held = copied + 2 * FLOAT * count * later
    filtered = (BOOLEAN + FLOAT) * count
    drawn = 3 * FLOAT * count
    if sampling == TOP_P:
        scaled = FLOAT * count
        filtered = scaled + max(filtered, nucleus_bytes(batch, vocabulary))
    return max(copied + old, held + filtered, copied + drawn)


def nucleus_bytes(batch: int, vocabulary: int) -> int:
    """Top-p's part: sorted scores with positions, and a sort's scratch or their sums.

    Sums are made of shares, which are gone when masks and the result are made.
    """
    count = batch * vocabulary
    summed = FLOAT + max(FLOAT, 2 * BOOLEAN + FLOAT)
    sorting = sum(scratch_blocks(batch, vocabulary, FLOAT))
    return (FLOAT + POSITION_BYTES) * count + max(sorting, summed * count)
