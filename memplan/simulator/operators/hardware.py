"""Figures of a card's chip that kernels size their scratch by."""

from __future__ import annotations

from memplan.gpu import Gpu

_MULTIPROCESSORS = {
    (6, 0): 56,  # P100
    (6, 1): 28,  # GTX 1080 Ti
    (7, 0): 80,  # V100
    (7, 5): 40,  # T4
    (8, 0): 108,  # A100
    (8, 6): 28,  # RTX 3060
    (8, 9): 58,  # L4
    (9, 0): 132,  # H100 SXM
    (10, 0): 148,  # B200
    (12, 0): 170,  # RTX 5090
}
"""Multiprocessors of a common card of each compute capability, by NVIDIA's
specifications. They decide only when small scratch is needed, never its main part."""

_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
"""Resident threads of a multiprocessor, where not 2048 (CUDA C++ Programming Guide,
technical specifications per compute capability)."""


def multiprocessors(gpu: Gpu) -> int:
    """Multiprocessors of the card, or of a common one of its capability."""
    return _MULTIPROCESSORS.get(gpu.compute_capability, 80)


def resident_threads(gpu: Gpu) -> int:
    """Threads that one multiprocessor of the card holds at once."""
    return _THREADS.get(gpu.compute_capability, 2048)
