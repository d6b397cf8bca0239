"""Matrix products: operands that cuBLAS cannot read are copied, and its workspace.

Source: aten/src/ATen/native/cuda/Blas.cpp, `prepare_matrix_for_cublas` and
`prepare_batch_matrix_for_cublas`; CublasHandlePool.cpp.
"""

from __future__ import annotations

import torch

from memplan.cublas import LT_WORKSPACE_BYTES, workspace_bytes
from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.simulator.operators.hardware import multiprocessors
from memplan.units import round_up


@rule("aten::mm", "aten::bmm", "aten::dot", "aten::mv")
def product(call: Call) -> None:
    """The output, copies of unreadable operands, the workspace of the first product."""
    call.outputs()
    _copy_operands(call, call.args[:2])
    call.workspace(workspace_bytes(call.gpu))


@rule("aten::addmm")
def product_and_bias(call: Call) -> None:
    """As a product; a bias is added by cuBLASLt, which has a workspace of its own.

    Unified workspaces are in the source, but runs with biases on torch 2.10 and 2.14
    hold exactly 1 MiB more for each thread than those without.
    """
    addend, _, mat2 = call.args[:3]
    call.outputs()
    _copy_operands(call, call.args[1:3])
    call.workspace(workspace_bytes(call.gpu))
    fused = addend.dim() == 1 and addend.is_contiguous() and min(mat2.shape) > 1
    if fused and addend.shape[0] == mat2.shape[1]:
        call.workspace(LT_WORKSPACE_BYTES, "cublasLt")


@rule("aten::baddbmm")
def product_and_sum(call: Call) -> None:
    """As a product; the addend is copied into the output, which takes no more."""
    call.outputs()
    _copy_operands(call, call.args[1:3])
    call.workspace(workspace_bytes(call.gpu))


@rule("aten::_grouped_mm")
def grouped_product(call: Call) -> None:
    """Experts' products in one kernel, or in a loop of products without copies.

    Source: aten/src/ATen/native/cuda/GroupedBlas.cpp, `_grouped_mm_cuda`, and
    GroupMM.cu. Bfloat16 on 9.0 and 10.0 takes one CUTLASS kernel, for which two blocks
    hold pointers, strides and sizes by group, and descriptors by multiprocessor.
    """
    first, second = call.args[:2]
    call.give(_grouped_output(first, second, call.argument(2, "offs")))
    bfloat16 = first.dtype == second.dtype == torch.bfloat16
    if not bfloat16 or call.gpu.compute_capability not in _GROUPED_KERNEL_CAPABILITIES:
        call.workspace(workspace_bytes(call.gpu))
        return
    groups = second.shape[0] if second.dim() == 3 else call.argument(2, "offs").numel()
    pointers = 3 * 8 * (groups + groups % 2)
    call.temporary(pointers + 3 * 4 * groups + 3 * 8 * groups)
    call.temporary(_DESCRIPTORS * _DESCRIPTOR_BYTES * multiprocessors(call.gpu))


@rule("transformers::grouped_mm_fallback", "transformers::grouped_mm_fallback_backward")
def grouped_product_in_a_loop(call: Call) -> None:
    """Outputs of zeros that a loop of products writes into, frozen weights' too.

    Source: transformers.integrations.moe, `_grouped_mm_fallback` and its backward.
    """
    call.outputs()
    call.workspace(workspace_bytes(call.gpu))


_GROUPED_KERNEL_CAPABILITIES = ((9, 0), (10, 0))

_DESCRIPTOR_BYTES = 128
"""A TMA descriptor."""

_DESCRIPTORS = 4
"""Of A, B, C and D, for each multiprocessor (CUTLASS, `get_workspace_size`)."""


def _grouped_output(
    first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor | None
) -> torch.Tensor:
    """The output with rows of 16 bytes (`create_grouped_gemm_output_tensor`)."""
    columns = second.shape[-1]
    step = 16 // first.element_size()
    padded = round_up(columns, step)
    rows = first.shape[-2]
    if (first.dim() == 2) != (second.dim() == 2):
        shape: tuple[int, ...] = (rows, columns)
        strides: tuple[int, ...] = (padded, 1)
    else:
        groups = first.shape[0] if offsets is None else offsets.numel()
        shape, strides = (groups, rows, columns), (rows * padded, padded, 1)
    return torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)


def is_readable(matrix: torch.Tensor) -> bool:
    """Whether cuBLAS reads the matrix in place: its last sides row- or column-major.

    The batch stride may be anything, 0 included.
    """
    rows, columns = matrix.shape[-2:]
    row_stride, column_stride = matrix.stride()[-2:]
    return (column_stride == 1 and row_stride >= max(1, columns)) or (
        row_stride == 1 and column_stride >= max(1, rows)
    )


def _copy_operands(call: Call, operands: tuple[torch.Tensor, ...]) -> None:
    for operand in operands:
        if operand.dim() >= 2 and not is_readable(operand):
            call.temporary(tensor_bytes(operand))
