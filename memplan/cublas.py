"""Workspaces of cuBLAS, which PyTorch takes from its caching allocator.

Source: aten/src/ATen/cuda/CublasHandlePool.cpp.
"""

from __future__ import annotations

from memplan.gpu import Gpu

_LARGE_WORKSPACE_MAJORS = (9, 10, 12)
"""Capabilities with a 32 MiB cuBLAS workspace in torch 2.13."""

LT_WORKSPACE_BYTES = 1024 * 1024
"""`_parseChosenWorkspaceSize`: CUBLASLT_WORKSPACE_SIZE's default, 1024 KiB."""


def workspace_bytes(gpu: Gpu) -> int:
    """The workspace of a thread's cuBLAS handle (`parseChosenWorkspaceSize`)."""
    if gpu.compute_capability[0] in _LARGE_WORKSPACE_MAJORS:
        return 4096 * 8 * 1024
    return 4096 * 1024 * 2 + 16 * 1024 * 8
