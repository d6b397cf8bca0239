"""The fused attention kernels: what they hold beyond their outputs.

Shapes: q (B, H, M, D), k and v (B, Hk, N, D). Sources: flash_api.cpp (`mha_bwd`),
attention_backward.cu (`_efficient_attention_backward`) and kernel_backward.h (the
workspace), of aten/src/ATen/native/transformers/cuda.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.simulator.operators.hardware import multiprocessors
from memplan.units import round_up

FLOAT_BYTES = 4


@rule("aten::_scaled_dot_product_flash_attention")
def flash(call: Call) -> None:
    """The outputs, then float32 parts where keys are split to fill the card."""
    q, k = call.args[:2]
    call.outputs()
    if call.argument(3, "dropout_p", 0.0) > 0:
        return
    splits = flash_splits(q.shape, k.shape[2], multiprocessors(call.gpu))
    if splits > 1:
        batch, heads, rows, head_dim = q.shape
        sums = FLOAT_BYTES * splits * batch * heads * rows
        call.temporary(sums)
        call.temporary(sums * _rounded_head(head_dim))


def flash_splits(
    query: tuple[int, ...], num_keys: int, num_multiprocessors: int
) -> int:
    """Splits of the keys (flash_api.cpp, `num_splits_heuristic`).

    The fewest that keep within 85 % of the best share of the card at work.
    """
    batch, heads, rows, head_dim = query
    tiles = batch * heads * math.ceil(rows / 64)
    slots = 2 * num_multiprocessors
    if tiles >= 0.8 * slots:
        return 1
    width = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
    blocks = math.ceil(num_keys / width)
    shares = {}
    for splits in range(1, min(128, slots, blocks) + 1):
        same = splits > 1 and math.ceil(blocks / splits) == math.ceil(
            blocks / (splits - 1)
        )
        if not same:
            waves = tiles * splits / slots
            shares[splits] = waves / math.ceil(waves)
    best = max(shares.values())
    return next(splits for splits, share in shares.items() if share >= 0.85 * best)


@rule("aten::_scaled_dot_product_flash_attention_backward")
def flash_backward(call: Call) -> None:
    """Copies of operands in another layout, the gradients, then float32 accumulators.

    Row sums of dO * O and an accumulator of dQ, both over M rounded up to 128; with
    grouped heads, dK and dV of every query head.
    """
    grad, q, k, _, out = call.args[:5]
    batch, heads, rows, head_dim = q.shape
    for tensor in (grad, out):
        if not tensor.transpose(1, 2).is_contiguous():
            call.temporary(tensor_bytes(tensor))
    call.outputs()
    rounded_rows = round_up(rows, 128)
    rounded_dim = _rounded_head(head_dim)
    call.temporary(FLOAT_BYTES * batch * heads * rounded_rows)
    call.temporary(FLOAT_BYTES * batch * rounded_rows * heads * rounded_dim)
    if k.shape[1] != heads:
        expanded = batch * k.shape[2] * heads * head_dim * q.element_size()
        call.temporary(expanded)
        call.temporary(expanded)


@rule("aten::_scaled_dot_product_efficient_attention")
def efficient(call: Call) -> None:
    """The output and the log-sum-exp; seed and offset stay on the host.

    Half precision above a head size of 128 accumulates the output in float32.
    """
    q, v = call.args[0], call.args[2]
    out, logsumexp, seed, offset = call.func(*call.args, **call.kwargs)
    call.ignore(seed, offset)
    call.give((out, logsumexp, seed, offset))
    if v.shape[-1] > 128 and q.element_size() == 2:
        call.temporary(FLOAT_BYTES * out.numel())


@rule("aten::_scaled_dot_product_efficient_attention_backward")
def efficient_backward(call: Call) -> None:
    """A copy of the gradient in another layout, the gradients, delta, the workspace."""
    grad, q, k, v, _, out = call.args[:6]
    if not grad.transpose(1, 2).is_contiguous():
        call.temporary(tensor_bytes(grad))
    call.outputs()
    batch, heads, rows, _ = q.shape
    if q.dtype == torch.float32:
        product = call.temporary(FLOAT_BYTES * out.numel())
        sums = call.temporary(FLOAT_BYTES * batch * heads * rows)
        call.temporary(FLOAT_BYTES * batch * heads * rows)
        call.free(product)
        call.free(sums)
    else:
        call.temporary(FLOAT_BYTES * batch * heads * rows)
    call.temporary(efficient_workspace_bytes(q, k, v, call.gpu.compute_capability))


@rule("aten::_scaled_dot_product_cudnn_attention_backward")
def cudnn_backward(call: Call) -> None:
    """The gradients, then one workspace: a float32 accumulator of dQ and row sums.

    cudnn-frontend, `CompositeSDPABackwardNode`; what the backend's plan adds is not
    public.
    """
    q = call.args[1]
    batch, heads, rows, head_dim = q.shape
    call.outputs()
    call.temporary(FLOAT_BYTES * batch * heads * rows * (head_dim + 1))


class _Tile(NamedTuple):
    """Rows of queries and of keys that a block of the backward kernel works on."""

    queries: int
    keys: int
    accumulates_kv: bool
    """Whether dK and dV are gathered in float32 too."""


def efficient_workspace_bytes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, capability: tuple[int, int]
) -> int:
    """The float32 accumulators of the memory-efficient backward.

    Source: kernel_backward.h, `workspace_size`: for each batch and head, dQ by tiles of
    queries with 16 floats of bookkeeping, and dK and dV by splits of the keys where the
    kernel cannot keep them in registers.
    """
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    head_dim = max(q.shape[-1], v.shape[-1])
    tile = _tile(q.element_size(), head_dim, capability)
    query_tiles = math.ceil(rows / tile.queries) * math.ceil(head_dim / tile.keys)
    floats = query_tiles * (16 + 4 * tile.queries * tile.keys) // 4
    if tile.accumulates_kv:
        splits = max(1, min(math.ceil(columns / tile.keys), 200 // (batch * heads)))
        floats += splits * tile.keys * round_up(q.shape[-1], tile.queries)
        floats += splits * tile.keys * round_up(v.shape[-1], tile.queries)
    return FLOAT_BYTES * batch * heads * round_up(floats, 4)


def _tile(itemsize: int, head_dim: int, capability: tuple[int, int]) -> _Tile:
    """The first kernel that fits the chip's shared memory (cutlassB.h)."""
    large = capability in ((8, 0), (9, 0), (10, 0))
    if head_dim <= 64:
        return _Tile(64, 64, False)
    if itemsize == FLOAT_BYTES:
        return _Tile(128, 64, False) if large else _Tile(64, 64, False)
    if head_dim > 128:
        return _Tile(128, 64, True)
    if large:
        return _Tile(128, 128, False)
    if capability[0] < 8:
        return _Tile(128, 64, False)
    if head_dim <= 96 and capability in ((8, 6), (8, 9)):
        return _Tile(128, 64, False)
    return _Tile(64, 64, True)


def _rounded_head(head_dim: int) -> int:
    """The head size that flash kernels work on."""
    return round_up(head_dim, 32 if head_dim <= 128 else 64)
