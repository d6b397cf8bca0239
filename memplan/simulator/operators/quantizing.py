"""bitsandbytes' CUDA operators that quantise weights, and that undo LLM.int8().

Source: bitsandbytes `backends/cuda/ops.py`: `quantize_4bit`, `quantize_blockwise`;
`_ops.py`: `int8_vectorwise_dequant`.
"""

from __future__ import annotations

import math

import torch

from memplan.simulator.operators import Call, rule, tensor_bytes

SCALE_BYTES = 4
"""An absmax is a float32."""


@rule("bitsandbytes::quantize_4bit")
def quantize_4bit(call: Call) -> None:
    """A contiguous copy where it takes one, absmax by block, then the packed codes."""
    values, block_size, _, storage = call.args
    if not values.is_contiguous():
        call.temporary(tensor_bytes(values))
    count = values.numel()
    absmax = torch.empty(
        math.ceil(count / block_size), dtype=torch.float32, device=values.device
    )
    packed = torch.empty(
        ((count + 1) // (storage.itemsize * 2), 1), dtype=storage, device=values.device
    )
    call.give((packed, absmax), order=(1, 0))


@rule("bitsandbytes::quantize_blockwise")
def quantize_blockwise(call: Call) -> None:
    """Absmax by block, then the codes."""
    values, _, block_size = call.args
    absmax = torch.empty(
        math.ceil(values.numel() / block_size),
        dtype=torch.float32,
        device=values.device,
    )
    codes = torch.empty_like(values, dtype=torch.uint8)
    call.give((codes, absmax), order=(1, 0))


@rule("bitsandbytes::int8_vectorwise_dequant")
def int8_vectorwise_dequant(call: Call) -> None:
    """Rows times their scales, in float32, then that times 1 / 127."""
    call.temporary(tensor_bytes(call.args[0], torch.float32.itemsize))
