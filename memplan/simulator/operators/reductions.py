"""Sums and norms that are split over thread blocks gather their parts in a buffer.

Source: aten/src/ATen/native/cuda/Reduce.cuh, `setReduceConfig`, `global_memory_size`
and `gpu_reduce_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from memplan.gpu import Gpu
from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.simulator.operators.hardware import multiprocessors, resident_threads

ACCUMULATOR_BYTES = 4
"""Sums of half and single precision are gathered in float32, of int64 in itself."""

PAIR_BYTES = 16
"""A value and its position, as C++ pads them."""

LARGEST_BLOCK = 512
"""`mnt_wrapper::MAX_NUM_THREADS`: threads of a reducing block."""

WARP = 32


@rule("aten::sum.dim_IntList", "aten::mean.dim", "aten::linalg_vector_norm")
def reduction(call: Call) -> None:
    """The output, then the buffer of parts and one semaphore a column of blocks."""
    values = call.args[0]
    dims = _reduced_dims(call, values)
    _take_cast_input(call, call.outputs())
    for num_bytes in scratch_bytes(values, dims, call.gpu):
        call.temporary(num_bytes)


@rule("aten::sum", "aten::mean", "aten::max", "aten::min", "aten::all", "aten::any")
def full_reduction(call: Call) -> None:
    """The output, then the buffer of parts."""
    values = call.args[0]
    _take_cast_input(call, call.outputs())
    if len(call.args) == 1:
        for num_bytes in scratch_bytes(values, range(values.dim()), call.gpu):
            call.temporary(num_bytes)


@rule("aten::amax", "aten::amin")
def extremes(call: Call) -> None:
    """The output, then the buffer of parts."""
    values = call.args[0]
    call.outputs()
    for num_bytes in scratch_bytes(values, _reduced_dims(call, values), call.gpu):
        call.temporary(num_bytes)


@rule("aten::argmax", "aten::argmin")
def extreme_position(call: Call) -> None:
    """The output, then the buffer of pairs: a float32 and its position."""
    values = call.args[0]
    call.outputs()
    for num_bytes in scratch_bytes(
        values, _reduced_dims(call, values), call.gpu, PAIR_BYTES
    ):
        call.temporary(num_bytes)


def _take_cast_input(call: Call, result: Any) -> None:
    """A copy of the input in the result's precision, where the kernel cannot cast.

    It casts half precision to float32 itself, and reads truth values for all and any
    (aten/src/ATen/native/ReduceOpsUtils.h, `make_reduction_from_ty`).
    """
    values = call.args[0]
    if not isinstance(result, torch.Tensor) or result.dtype == values.dtype:
        return
    widened = values.element_size() == 2 and result.dtype == torch.float32
    if not widened and result.dtype != torch.bool:
        call.temporary(tensor_bytes(values, result.element_size()))


def scratch_bytes(
    values: torch.Tensor, dims: Sequence[int], gpu: Gpu, part_bytes: int = 0
) -> tuple[int, ...]:
    """The buffer and the semaphores of a reduction over `dims`; () where none is made.

    Columns are summed by blocks that each keep every thread's part, by default in the
    precision in which numbers are summed.
    """
    part_bytes = part_bytes or max(ACCUMULATOR_BYTES, values.element_size())
    per_output = math.prod(values.shape[dim] for dim in dims)
    if not per_output or not values.numel():
        return ()
    num_outputs = values.numel() // per_output
    fastest = _reduces_fastest(values, dims)
    vector = 4 if not fastest and num_outputs % 4 == 0 else 1
    width, height = _block(per_output, num_outputs // vector, fastest, vector)
    step_in = width if fastest else 1
    step_out = 1 if fastest else width
    split = math.ceil(per_output / step_in) >= min(16 * height, 256)
    if split:
        step_in *= height
    else:
        step_out *= height
    columns = math.ceil(num_outputs / vector / step_out)
    ctas = _ctas(per_output, step_in, width * height, columns, gpu) if split else 1
    if ctas == 1:
        return ()
    parts = 1 if fastest else width * vector
    return part_bytes * num_outputs * ctas * parts, 4 * columns


def _block(
    per_output: int, num_outputs: int, fastest: bool, vector: int
) -> tuple[int, int]:
    """Width and height of a block of threads (`set_block_dimension`)."""
    inner, outer = (per_output, num_outputs) if fastest else (num_outputs, per_output)
    if fastest and inner >= 128:
        inner //= 4
    limit = LARGEST_BLOCK // vector
    inner, outer = _power_of_two(inner, limit), _power_of_two(outer, limit)
    width = min(inner, WARP)
    height = min(outer, limit // width)
    return min(inner, limit // height), height


def _ctas(
    per_output: int, step_in: int, block_threads: int, columns: int, gpu: Gpu
) -> int:
    """Blocks that share one output (`setReduceConfig`)."""
    per_thread = math.ceil(per_output / step_in)
    target = multiprocessors(gpu) * (resident_threads(gpu) // block_threads)
    if per_thread < 256 or columns > target:
        return 1
    wanted = min(math.ceil(target / columns), math.ceil(per_thread / 16))
    return max(wanted, math.ceil(per_thread / 256))


def _reduces_fastest(values: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether the reduced sides are the ones that lie closest in memory."""
    kept = [
        d for d in range(values.dim()) if d not in set(dims) and values.shape[d] > 1
    ]
    if not kept:
        return True
    reduced = [values.stride(d) for d in dims if values.shape[d] > 1]
    return bool(reduced) and min(reduced) < min(values.stride(d) for d in kept)


def _reduced_dims(call: Call, values: torch.Tensor) -> list[int]:
    index, name = (2, "dim") if "norm" in call.func.name() else (1, "dim")
    given = call.argument(index, name)
    if given is None or given == []:
        return list(range(values.dim()))
    dims = [given] if isinstance(given, int) else given
    return [dim % max(values.dim(), 1) for dim in dims]


def _power_of_two(value: int, limit: int) -> int:
    """The largest power of two up to the value and the limit."""
    return 1 << (min(max(value, 1), limit).bit_length() - 1)
