"""The gradient of an embedding's weight.

Source: aten/src/ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu. Shapes:
T indices of 8 bytes, V rows of width h.
"""

from __future__ import annotations

from memplan.simulator.operators import Call, rule

SMALL_COUNT = 3072
"""Indices up to which one kernel adds rows without sorting."""

ROWS_PER_THREAD = 10
"""`NROWS_PER_THREAD`: rows that one partial sum covers."""


@rule("aten::embedding_dense_backward")
def embedding_dense_backward(call: Call) -> None:
    """Above 3072 indices they are sorted, and rows summed in float32 by segments."""
    grad, indices, num_rows = call.args[:3]
    count = indices.numel()
    if count <= SMALL_COUNT:
        call.outputs()
        return
    index_bytes = 8 * count
    call.temporary(index_bytes)
    call.temporary(index_bytes)
    positions = call.temporary(index_bytes)
    sort_scratch = call.temporary(2 * index_bytes)
    call.free(sort_scratch)
    call.free(positions)
    call.outputs()
    segments = min(count, num_rows)
    partials = count // ROWS_PER_THREAD + segments
    call.temporary(index_bytes)
    call.temporary(8 * segments)
    call.temporary(8 * segments)
    call.temporary(8 * partials)
    call.temporary(4 * partials * grad.shape[-1])
