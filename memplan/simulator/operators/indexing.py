"""Indexing, sorting and scanning.

Sources, in aten/src/ATen/native/cuda: Indexing.cu (`index_put_with_sort_kernel`),
Sort.cpp and SortStable.cu, ScanKernels.cpp, IndexKernel.cpp (`masked_scatter__cuda`);
aten/src/ATen/native/TensorAdvancedIndexing.cpp (`make_info`); Distributions.cpp
(`multinomial_out`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.sorting import (
    LARGEST_SMALL_SORT,
    POSITION_BYTES,
    radix_bytes,
    scratch_blocks,
)

INDEX_BYTES = 8
"""An index."""


@rule("aten::index")
def index(call: Call) -> None:
    """Copies of indices that do not lie alike once they are expanded; the output."""
    indices = [index for index in call.args[1] if index is not None]
    if len(indices) > 1:
        expanded = torch.broadcast_tensors(*indices)
        if len({index.stride() for index in expanded}) > 1:
            for one in expanded:
                if not one.is_contiguous():
                    call.temporary(INDEX_BYTES * one.numel())
    call.outputs()


@rule("aten::index_put", "aten::_index_put_impl_", "aten::index_put_")
def index_put(call: Call) -> None:
    """With accumulation: linear, sorted and original positions, and the sort's scratch.

    The gradient of indexing adds into its zeros in place, but not over meta tensors
    (torch/csrc/autograd/FunctionsManual.cpp, `index_backward`).
    """
    target, _, values = call.args[:3]
    accumulate = call.argument(3, "accumulate", False)
    node = torch._C._current_autograd_node()
    if accumulate and node is not None and not torch.is_grad_enabled():
        call.give(target)
    else:
        call.outputs()
    if not accumulate:
        return
    indices = [index for index in call.args[1] if index is not None]
    count = max((index.numel() for index in indices), default=values.numel())
    call.temporary(INDEX_BYTES * count)
    if not values.is_contiguous():
        call.temporary(tensor_bytes(values))
    for _ in range(2):
        call.temporary(INDEX_BYTES * count)
    _hold(call, (POSITION_BYTES * count, radix_bytes(count, INDEX_BYTES)))


@rule("aten::sort")
def sort(call: Call) -> None:
    """Values and positions; above 4096, a copy of another layout and a radix sort's."""
    values = call.args[0]
    outputs = call.outputs()
    side = outputs[0].shape[_sorted_dim(call, values)] if values.dim() else 1
    if side <= LARGEST_SMALL_SORT:
        return
    if not values.is_contiguous():
        call.temporary(tensor_bytes(values))
    rows = values.numel() // side
    _hold(call, scratch_blocks(rows, side, values.element_size()))


@rule("aten::cumsum")
def cumsum(call: Call) -> None:
    """The output, then a copy of an input in another precision or layout."""
    values = call.args[0]
    result = call.outputs()
    if result.dtype != values.dtype or not values.is_contiguous():
        call.temporary(tensor_bytes(values, result.element_size()))


@rule("aten::multinomial")
def multinomial(call: Call) -> None:
    """The output; for a draw of one, random numbers that the shares are divided by."""
    call.outputs()
    call.temporary(tensor_bytes(call.args[0]))


@rule("aten::masked_scatter")
def masked_scatter(call: Call) -> None:
    """The output, then the sums of the mask and copies of mask and source."""
    target, mask, source = call.args[:3]
    call.outputs()
    call.temporary(INDEX_BYTES * target.numel())
    expanded = mask.expand(target.shape)
    for tensor in (expanded, source):
        if not tensor.is_contiguous():
            call.temporary(tensor_bytes(tensor))


@rule("aten::masked_scatter_backward")
def masked_scatter_backward(call: Call) -> None:
    """Positions of what the mask shows, one index a side; then what is picked."""
    mask = call.args[1]
    call.temporary(INDEX_BYTES * mask.dim() * mask.numel())
    call.outputs()


def _hold(call: Call, sizes: Iterable[int]) -> None:
    """Blocks that are there at once; the last goes first."""
    for block in reversed([call.temporary(size) for size in sizes]):
        call.free(block)


def _sorted_dim(call: Call, values: torch.Tensor) -> int:
    """The sorted side: `sort(self, dim)`, or `sort.stable(self, *, stable, dim)`."""
    stable = "stable" in call.func.name()
    dim = call.kwargs.get("dim", -1) if stable else call.argument(1, "dim", -1)
    return int(dim) % values.dim()
