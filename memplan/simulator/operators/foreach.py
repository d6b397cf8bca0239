"""Operators over lists of tensors.

Source: aten/src/ATen/native/cuda/ForeachReduceOp.cu, `foreach_tensor_norm_cuda`. Lists
of pointers travel as kernel arguments and take no memory.
"""

from __future__ import annotations

import math

from memplan.simulator.operators import Call, rule

CHUNK = 65536
"""`kChunkSize`: numbers that one block reduces."""


@rule("aten::_foreach_norm")
def foreach_norm(call: Call) -> None:
    """A float32 part for each chunk of the longest tensor, for every tensor."""
    tensors = call.args[0]
    longest = max(tensor.numel() for tensor in tensors)
    call.temporary(4 * len(tensors) * math.ceil(longest / CHUNK))
    call.outputs()
