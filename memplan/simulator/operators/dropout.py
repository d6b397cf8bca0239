"""Dropout in one kernel: a byte a number for the mask.

Source: aten/src/ATen/native/cuda/Dropout.cu, `dropout_cuda`.
"""

from __future__ import annotations

from memplan.simulator.operators import Call, rule


@rule("aten::native_dropout")
def native_dropout(call: Call) -> None:
    """The mask is allocated before the output."""
    call.give(call.func(*call.args, **call.kwargs), order=(1, 0))
