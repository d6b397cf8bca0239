"""Layer norm.

Source: aten/src/ATen/native/cuda/layer_norm_kernel.cu (torch 2.7 and later): the
gradients of scale and shift are summed by blocks of rows where rows are many and short.
Shapes: M rows of N numbers.
"""

from __future__ import annotations

import math

from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.simulator.operators.hardware import multiprocessors

MOST_ROWS = 64 * 1024
"""Rows above which they may be summed in parts."""

PART_COLUMNS = 32
PART_ROWS = 32
MOST_PARTS = 32768
"""Columns and rows of a block, and the bound of blocks over both sides."""


@rule("aten::native_layer_norm")
def layer_norm(call: Call) -> None:
    """A copy of an input in another layout; the output, means and deviations."""
    values = call.args[0]
    if not values.is_contiguous():
        call.temporary(tensor_bytes(values))
    call.outputs()


@rule("aten::native_layer_norm_backward")
def layer_norm_backward(call: Call) -> None:
    """Copies of operands in another layout, the gradients, then parts of their sums."""
    grad, values, shape = call.args[:3]
    for tensor in (grad, values):
        if not tensor.is_contiguous():
            call.temporary(tensor_bytes(tensor))
    _, scale, shift = call.outputs()
    columns = math.prod(shape)
    rows = values.numel() // columns
    blocks = math.ceil(columns / PART_COLUMNS)
    if rows <= MOST_ROWS or blocks >= multiprocessors(call.gpu) / 2:
        return
    parts = min(MOST_PARTS // blocks, math.ceil(rows / PART_ROWS))
    for gradient in (scale, shift):
        if gradient is not None:
            call.temporary(parts * columns * gradient.element_size())
