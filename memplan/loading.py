"""How transformers loads a checkpoint onto a card: in which order, how much at once.

Source: transformers 5.23, `modeling_utils.caching_allocator_warmup` and
`core_model_loading.dot_natural_key`; bitsandbytes 0.50, `nn.Params4bit._quantize` and
`nn.Int8Params._quantize`.
"""

from __future__ import annotations

HALF_BYTES = 2
"""A number of a weight that is still to be quantised."""

WARMUP_KEPT_FREE_BYTES = int(1.2 * 2**30)
"""What the warm-up block leaves of the card."""


def warmup_bytes(weights_bytes: int, capacity_bytes: int) -> int:
    """The block for all weights, from whose segment they are cut."""
    return min(weights_bytes, max(0, capacity_bytes - WARMUP_KEPT_FREE_BYTES))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts tensors: numbers by value and before words, words by alphabet."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in name.split(".")
    ]
