"""Softmax: what its backward and the safe variant hold inside.

Source: aten/src/ATen/native/cuda/SoftMax.cu, `softmax_backward_cuda_out` and
`host_softmax`; aten/src/ATen/native/transformers/attention.cpp, `_safe_softmax`.
"""

from __future__ import annotations

from memplan.simulator.operators import Call, rule, tensor_bytes


@rule("aten::_softmax", "aten::_log_softmax")
def forward(call: Call) -> None:
    """The output, then a copy of an input that is not contiguous."""
    call.outputs()
    scores = call.args[0]
    if not scores.is_contiguous():
        call.temporary(tensor_bytes(scores))


@rule("aten::_softmax_backward_data")
def backward(call: Call) -> None:
    """The output, then grad * output in the wider of their precisions."""
    grad, output = call.args[:2]
    call.outputs()
    call.temporary(tensor_bytes(grad, max(grad.element_size(), output.element_size())))
    if not output.is_contiguous():
        call.temporary(tensor_bytes(output))


@rule("aten::_log_softmax_backward_data")
def log_backward(call: Call) -> None:
    """The output, then copies of inputs that are not contiguous."""
    call.outputs()
    for tensor in call.args[:2]:
        if not tensor.is_contiguous():
            call.temporary(tensor_bytes(tensor))


@rule("aten::_safe_softmax")
def safe(call: Call) -> None:
    """softmax(x), whether x == -inf, all of a row, and a zero written where so."""
    scores = call.args[0]
    call.outputs()
    call.temporary(tensor_bytes(scores, 1))
    call.temporary(scores.numel() // scores.shape[-1])
    call.temporary(scores.element_size())
