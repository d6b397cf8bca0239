"""The linear layer of shifted NF4 blocks, and the search for the shifts."""

from __future__ import annotations

import functools
import math
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch.nn import functional as F

from memplan.quantizations._four_bits import BLOCK_SIZE, NESTED_BLOCK_SIZE

SHIFT_RANGE = 0.1
"""Largest shift from the block's median, in standard deviations (`tau_range`)."""

SHIFT_STEPS = 100
"""Candidates on either side of the median (`tau_n`)."""

SIGMA = 1 / 1.8481308
"""A normal block's standard deviation by its absmax: the quantile 0.9677083, inverted
(`sigma`)."""

NUM_CODES = 16

NUMBERS_AT_ONCE = 2**22
"""Weights times candidates that are quantised together."""


class ShiftedLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """y = (NF4^-1(codes) + t) x + b, with a shift t for each block of the weight."""

    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, **kwargs)
        self.recomputes = True
        """Whether backward dequantises again; else the dense weight is kept for it."""
        blocks = math.ceil(in_features * out_features / BLOCK_SIZE)
        nested = math.ceil(blocks / NESTED_BLOCK_SIZE)
        device = kwargs.get("device")
        for name, size, dtype in (
            ("tau_quant", blocks, torch.uint8),
            ("tau_absmax", nested, torch.float32),
        ):
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))

    def take_shifts(self, shifts: torch.Tensor) -> None:
        """Keeps shifts, a number a block, in 8 bits."""
        self.tau_quant, state = functional.quantize_blockwise(
            shifts.float(), code=_code(shifts.device), blocksize=NESTED_BLOCK_SIZE
        )
        self.tau_absmax = state.absmax

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (o, i), shifted where it was dequantised."""
        weight = functional.dequantize_4bit(self.weight, self.weight.quant_state)
        dense: torch.Tensor = add_by_block(weight, self._shifts()).to(dtype)
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        if self.recomputes:
            out: torch.Tensor = _Recomputed.apply(inputs, self, bias)  # type: ignore[no-untyped-call]
        else:
            out = F.linear(inputs, self._dense_weight_out_of_place(inputs.dtype), bias)
        return out.to(x.dtype)

    def _dense_weight_out_of_place(self, dtype: torch.dtype) -> torch.Tensor:
        """As the published code does it: dequantised, in float32, and cast."""
        with torch.no_grad():
            weight = functional.dequantize_4bit(self.weight, self.weight.quant_state)
            blocks = weight.to(dtype).reshape(-1, BLOCK_SIZE)
            moved = blocks + self._shifts()[:, None]
            dense: torch.Tensor = moved.reshape(weight.shape).to(dtype)
            return dense

    def _shifts(self) -> torch.Tensor:
        shifts: torch.Tensor = functional.dequantize_blockwise(
            self.tau_quant,
            absmax=self.tau_absmax,
            code=_code(self.tau_quant.device),
            blocksize=NESTED_BLOCK_SIZE,
        )
        return shifts


class _Recomputed(torch.autograd.Function):
    """A product with a weight that is dequantised once more for the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, bias: Any) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return grad @ ctx.layer.dense_weight(grad.dtype), None, None


def best_shifts(values: torch.Tensor) -> torch.Tensor:
    """The shift of each block, near its median, whose NF4 codes have most entropy."""
    blocks = _by_block(values.float())
    middle = blocks.median(1).values
    absmax = (blocks - middle[:, None]).abs().amax(1)
    limit = SHIFT_RANGE * SIGMA
    factors = torch.linspace(-limit, limit, 2 * SHIFT_STEPS + 1, device=values.device)
    best = torch.full_like(middle, -math.inf)
    found = middle
    for some in factors.split(max(1, NUMBERS_AT_ONCE // blocks.numel())):
        shifts = middle + some[:, None] * absmax
        entropies = _entropy(blocks - shifts[..., None])
        entropy, index = entropies.max(0)
        candidate = shifts.gather(0, index[None])[0]
        found = torch.where(entropy > best, candidate, found)
        best = torch.maximum(entropy, best)
    return found


def shifted(values: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """A copy of values with a shift added to each block."""
    return add_by_block(values.clone(), shifts)


def add_by_block(values: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Adds a number to each block of 64, in place; the last may be shorter."""
    flat = values.view(-1)
    whole = flat.numel() // BLOCK_SIZE
    flat[: whole * BLOCK_SIZE].view(-1, BLOCK_SIZE).add_(shifts[:whole, None])
    if len(shifts) > whole:
        flat[whole * BLOCK_SIZE :].add_(shifts[whole])
    return values


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """Blocks of 64 as rows, the last filled up with its last number."""
    flat = values.reshape(-1)
    missing = -flat.numel() % BLOCK_SIZE
    return torch.cat([flat, flat[-1:].expand(missing)]).view(-1, BLOCK_SIZE)


def _entropy(blocks: torch.Tensor) -> torch.Tensor:
    """Entropy in bits of the NF4 codes of each block: (..., 64) -> (...)."""
    packed, _ = functional.quantize_4bit(blocks.contiguous(), quant_type="nf4")
    codes = torch.stack([packed >> 4, packed & 15], -1).view(blocks.shape).long()
    counts = torch.zeros(*blocks.shape[:-1], NUM_CODES, device=blocks.device)
    counts.scatter_add_(-1, codes, torch.ones_like(codes, dtype=counts.dtype))
    shares = counts / BLOCK_SIZE
    return -torch.xlogy(shares, shares).sum(-1) / math.log(2)


def _code(device: torch.device) -> torch.Tensor:
    """The 256 values that an 8-bit shift stands for, brought from the host."""
    return _code_on_host().to(device)


@functools.cache
def _code_on_host() -> torch.Tensor:
    code: torch.Tensor = functional.create_dynamic_map()
    return code
