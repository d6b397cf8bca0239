"""Gradients: one number for each trained one, in its precision."""

from __future__ import annotations

import math
from typing import Any

from memplan.architecture import Architecture
from memplan.estimator.layout import Role
from memplan.estimator.polynomials import larger, rounded, smaller
from memplan.estimator.regimes import dtype_outside
from memplan.estimator.trained import Trained, shapes_of
from memplan.estimator.weights import DTYPE_BYTES
from memplan.recipe import Recipe

SMALL_COUNT = 3072
"""Tokens up to which an embedding's gradient needs no sorting (Embedding.cu)."""

ROWS_PER_THREAD = 10
"""Rows that one partial sum covers (EmbeddingBackwardKernel.cu, NROWS_PER_THREAD)."""


def gradient_bytes(trained: Trained) -> int:
    """G = sum over trained tensors of their bytes."""
    return sum(t.count * rounded(t.bytes_each) for t in trained.with_gradient)


def layer_gradient_bytes(role: Role, recipe: Recipe) -> int:
    """The gradients of one linear layer, or of its adapter."""
    full = recipe.method == "full"
    item = DTYPE_BYTES[recipe.dtype if full else recipe.adapter_dtype]
    return sum(rounded(item * math.prod(shape)) for shape in shapes_of(role, recipe))


def embedding_scratch_bytes(architecture: Architecture, tokens: Any) -> Any:
    """What the kernel of an embedding's gradient holds besides the gradient.

    Above 3072 tokens N, three lists of N indices, and float32 sums of (p, H) for
    p = N // 10 + min(N, V) segments, with their numbers.
    """
    segments = smaller(tokens, architecture.vocab_size)
    partials = tokens // ROWS_PER_THREAD + segments
    lists = 8 * (3 * tokens + 2 * segments + partials)
    sums = 4 * partials * architecture.hidden_size
    return (lists + sums) * (larger(tokens, SMALL_COUNT) > SMALL_COUNT)


def embedding_bytes(architecture: Architecture, recipe: Recipe) -> int:
    """The gradient of the token embeddings, and that of a head of their shape."""
    numbers = architecture.vocab_size * architecture.hidden_size
    return rounded(numbers * DTYPE_BYTES[dtype_outside(recipe)])


def is_tied(architecture: Architecture, recipe: Recipe) -> bool:
    """Whether the head is the token embeddings and has no copy of its own to train."""
    has_head = any(linear.kind == "head" for linear in architecture.linears)
    return recipe.method == "full" and not has_head


def is_transposed(recipe: Recipe) -> bool:
    """Whether the gradient of the head's weight is a transposed view.

    The plain product's is (`mm(grad^T, hidden)^T`), and another gradient is not added
    to it in place; a loss that works on parts makes a tensor of its own, and so does
    the cast of a weight that autocast rounds.
    """
    is_cast = recipe.autocast not in ("none", recipe.dtype)
    return recipe.loss == "full" and not is_cast


def embedding_copies(architecture: Architecture, recipe: Recipe) -> int:
    """How many gradients of the embedding are there at once besides the kept one.

    A tied head's waits for the embedding's own, and their sum may be a third; where
    gradients accumulate, the step's is added to the kept one.
    """
    tied = is_tied(architecture, recipe)
    return (recipe.accumulation > 1) + tied * (1 + is_transposed(recipe))
