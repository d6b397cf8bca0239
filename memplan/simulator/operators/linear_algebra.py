"""Triangular systems, as the gated delta rule solves them.

Source: aten/src/ATen/native/BatchLinearAlgebra.cpp, `linalg_solve_triangular_out`;
aten/src/ATen/native/cuda/linalg: `triangular_solve_kernel`, `get_device_pointers`.
"""

from __future__ import annotations

import math

from memplan.cublas import workspace_bytes
from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.simulator.operators.gemm import is_readable

POINTER_BYTES = 8

LOOPED_BATCH = 8
LOOPED_SIDE = 64
"""At most so many systems of at least that side are solved one after another."""


@rule("aten::linalg_solve_triangular")
def solve_triangular(call: Call) -> None:
    """The solution, a copy of an unreadable matrix, pointers to every system."""
    matrix = call.args[0]
    call.outputs()
    if not is_readable(matrix):
        call.temporary(tensor_bytes(matrix))
    batch = math.prod(matrix.shape[:-2])
    if batch > LOOPED_BATCH or matrix.shape[-1] < LOOPED_SIDE:
        call.temporary(POINTER_BYTES * batch)
        call.temporary(POINTER_BYTES * batch)
    call.workspace(workspace_bytes(call.gpu))
