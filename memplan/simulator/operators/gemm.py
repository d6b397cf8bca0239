"""Matrix products: operands that cuBLAS cannot read are copied, and its workspace.

Source: aten/src/ATen/native/cuda/Blas.cpp, `prepare_matrix_for_cublas` and
`prepare_batch_matrix_for_cublas`; CublasHandlePool.cpp.
"""

from __future__ import annotations

import torch

from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.simulator.operators.hardware import cublas_workspace_bytes

CUBLASLT_WORKSPACE_BYTES = 1024 * 1024
"""`_parseChosenWorkspaceSize`: CUBLASLT_WORKSPACE_SIZE's default, 1024 KiB."""


@rule("aten::mm", "aten::bmm", "aten::dot", "aten::mv")
def product(call: Call) -> None:
    """The output, copies of unreadable operands, the workspace of the first product."""
    call.outputs()
    _copy_operands(call, call.args[:2])
    call.workspace(cublas_workspace_bytes(call.gpu))


@rule("aten::addmm")
def product_and_bias(call: Call) -> None:
    """As a product; a bias is added by cuBLASLt, which has a workspace of its own.

    Unified workspaces are in the source, but runs with biases on torch 2.10 and 2.14
    hold exactly 1 MiB more for each thread than those without.
    """
    addend, _, mat2 = call.args[:3]
    call.outputs()
    _copy_operands(call, call.args[1:3])
    call.workspace(cublas_workspace_bytes(call.gpu))
    fused = addend.dim() == 1 and addend.is_contiguous() and min(mat2.shape) > 1
    if fused and addend.shape[0] == mat2.shape[1]:
        call.workspace(CUBLASLT_WORKSPACE_BYTES, "cublasLt")


@rule("aten::baddbmm")
def product_and_sum(call: Call) -> None:
    """As a product; the addend is copied into the output, which takes no more."""
    call.outputs()
    _copy_operands(call, call.args[1:3])
    call.workspace(cublas_workspace_bytes(call.gpu))


@rule("aten::_grouped_mm")
def grouped_product(call: Call) -> None:
    """Experts' products in one CUTLASS kernel, which needs no cuBLAS workspace."""
    call.outputs()


def is_readable(matrix: torch.Tensor) -> bool:
    """Whether cuBLAS reads the matrix in place: its last two sides row- or column-major.

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
