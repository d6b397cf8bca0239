"""The optimizer's state, and what a step makes and drops again."""

from __future__ import annotations

import math
from collections import Counter
from itertools import repeat

from memplan import methods, optimizers
from memplan.estimator.polynomials import rounded
from memplan.estimator.trained import Trained, in_order
from memplan.recipe import Recipe

CHUNK = 65536
"""Numbers that one block of a norm's kernel reduces (ForeachReduceOp.cu)."""

NORM_BYTES = 512
"""The least that the allocator hands out, which a norm takes."""


def state_bytes(trained: Trained, recipe: Recipe) -> int:
    """S = sum over trained tensors of the bytes of their state, by the optimizer.

    What a method keeps besides is of adapters alone (`lora_` in RankAllocator's
    update_ipt, peft.tuners.adalora.layer).
    """
    optimizer = optimizers.find(recipe.optimizer)
    own = methods.find(recipe.method).optimizer_bytes_per_number
    return sum(
        t.count
        * sum(
            map(
                rounded,
                (
                    *optimizer.state_bytes(t.shape, t.item),
                    0 if t.is_copy else own * math.prod(t.shape),
                ),
            )
        )
        for t in trained.with_gradient
    )


def paged_bytes(trained: Trained, recipe: Recipe) -> int:
    """What of the state lies in CUDA's managed memory."""
    optimizer = optimizers.find(recipe.optimizer)
    return sum(t.count * optimizer.paged_bytes(t.shape) for t in trained.with_gradient)


def step_blocks(trained: Trained, recipe: Recipe) -> list[int]:
    """Blocks that a step holds at once besides state and gradients, in order."""
    bytes_each = {id(tensor): tensor.bytes_each for tensor in trained.with_gradient}
    sizes = [bytes_each[id(tensor)] for tensor in in_order(trained)]
    return _blocks(sizes, trained, recipe)


def step_bytes(trained: Trained, recipe: Recipe) -> int:
    """What a step holds at once besides state and gradients."""
    tensors = trained.with_gradient
    sizes = [size for t in tensors for size in repeat(t.bytes_each, t.count)]
    counts = Counter(_blocks(sizes, trained, recipe))
    return sum(count * rounded(size) for size, count in counts.items())


def _blocks(sizes: list[int], trained: Trained, recipe: Recipe) -> list[int]:
    if not sizes:
        return []
    optimizer = optimizers.find(recipe.optimizer)
    return list(optimizer.step_blocks(sizes, trained.with_gradient[0].item))


def clip_bytes(trained: Trained) -> int:
    """A norm for each of n gradients, all of them stacked, and the kernel's sums.

    Those are float32, one for each 65,536 numbers of the longest gradient, n times.
    """
    tensors = trained.with_gradient
    count = sum(t.count for t in tensors)
    longest = max((math.prod(t.shape) for t in tensors), default=0)
    sums = 4 * count * math.ceil(longest / CHUNK)
    return NORM_BYTES * count + rounded(4 * count) + rounded(sums)
