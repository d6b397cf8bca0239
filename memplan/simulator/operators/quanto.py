"""quanto's operators, which are programs of torch's own.

Source: optimum-quanto 0.2.7, `library.qbytes_mm` and `library.quantize`; what 4 and 2
bits are unpacked into is all that its CUDA kernel allocates (unpack.cu).
"""

from __future__ import annotations

import torch

from memplan.cublas import workspace_bytes
from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.simulator.operators.gemm import is_readable
from memplan.simulator.operators.quantized import product_dtype


@rule("quanto::qbytes_mm")
def qbytes_mm(call: Call) -> None:
    """The input in the scales' precision, the scaled weight, then torch's product."""
    inputs, weight, scales = call.args
    if inputs.dtype != scales.dtype:
        call.temporary(tensor_bytes(inputs, scales.element_size()))
    if weight.is_floating_point():
        call.temporary(tensor_bytes(weight, scales.element_size()))
    call.temporary(tensor_bytes(weight, scales.element_size()))
    dtype = product_dtype(scales)
    if dtype != scales.dtype:
        call.temporary(tensor_bytes(inputs, dtype.itemsize))
        call.temporary(tensor_bytes(weight, dtype.itemsize))
    shape = (*inputs.shape[:-1], weight.shape[0])
    call.give(torch.empty(shape, dtype=dtype, device=inputs.device))
    if not is_readable(inputs):
        call.temporary(tensor_bytes(inputs))
    call.workspace(workspace_bytes(call.gpu))


@rule("quanto::quantize_symmetric")
def quantize_symmetric(call: Call) -> None:
    """Weights over scales, rounded, clamped, and as integers."""
    values = tensor_bytes(call.args[0])
    _rounded(call, call.temporary(values), values)


@rule("quanto::quantize_affine")
def quantize_affine(call: Call) -> None:
    """Shifted weights over scales, rounded, clamped, and as integers."""
    values = tensor_bytes(call.args[0])
    shifted = call.temporary(values)
    scaled = call.temporary(values)
    call.free(shifted)
    _rounded(call, scaled, values)


def _rounded(call: Call, scaled: int, num_bytes: int) -> None:
    call.temporary(num_bytes)
    call.free(scaled)
    call.temporary(num_bytes)
    call.outputs()


@rule("aten::_weight_int4pack_mm")
def weight_int4pack_mm(call: Call) -> None:
    """The product alone (cuda/int4mm.cu); its meta kernel asks for a fake tensor."""
    inputs, weight = call.args[:2]
    shape = (inputs.shape[0], 8 * weight.shape[0])
    call.give(torch.empty(shape, dtype=inputs.dtype, device=inputs.device))
