"""Convolutions over a sequence, as linear attention has before its recurrence.

Source: aten/src/ATen/native/Convolution.cpp, `_convolution`, and ConvUtils.h,
`cudnn_conv_suggest_memory_format`. cuDNN's own workspace is not public; a depthwise
kernel needs none. Shapes: input (B, C, T).
"""

from __future__ import annotations

import torch

from memplan.simulator.operators import Call, rule, tensor_bytes


@rule("aten::convolution")
def convolution(call: Call) -> None:
    """A copy of an input that is neither dense by channel nor by time; the output.

    An input whose channels lie closest in memory gives such an output.
    """
    values = call.args[0]
    if values.dim() != 3:
        call.outputs()
        return
    if not (values.is_contiguous() or _channels_last(values)):
        call.temporary(tensor_bytes(values))
    result = call.func(*call.args, **call.kwargs)
    call.give(_like(result) if _channels_last(values) else result)


@rule("aten::convolution_backward")
def convolution_backward(call: Call) -> None:
    """A copy of a gradient in another layout, then the gradients."""
    grad, values = call.args[:2]
    alike = grad.is_contiguous() and not _channels_last(values)
    if not alike and not (_channels_last(grad) and _channels_last(values)):
        call.temporary(tensor_bytes(grad))
    call.outputs()


def _channels_last(values: torch.Tensor) -> bool:
    return values.dim() == 3 and values.transpose(1, 2).is_contiguous()


def _like(result: torch.Tensor) -> torch.Tensor:
    """The same shape with channels closest in memory."""
    batch, channels, length = result.shape
    return torch.empty(
        (batch, length, channels), dtype=result.dtype, device=result.device
    ).transpose(1, 2)
