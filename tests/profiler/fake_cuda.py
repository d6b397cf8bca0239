"""A card that is not there, behind torch's own functions over it.

Its allocator holds what tensors on the CPU take. Python code of torch 2.13 is run as it
is; what it calls in torch._C is played, with the arguments that torch's stubs name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memplan.profiler import child, cuda_meter
from memplan.profiler.cpu_meter import StorageTracker
from memplan.units import GIB, MIB

CARD = "NVIDIA A100-SXM4-80GB"
CAPACITY_BYTES = 80 * GIB
SEGMENT_BYTES = 2 * MIB
OTHERS_BYTES = 600 * MIB
"""What other processes hold on the card."""
CONTEXT_BYTES = 500 * MIB

NO_MEMORY = (
    "CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total capacity of "
    "{total} of which {free} is free. Including non-PyTorch memory, this process has "
    "{used} memory in use. Of the allocated memory {allocated} is allocated by "
    "PyTorch, and {cached} is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_ALLOC_CONF="
    "expandable_segments:True to avoid fragmentation.  See documentation for Memory "
    "Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html"
    "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
)
"""c10/cuda/CUDACachingAllocator.cpp, `malloc`, as it was printed on a card."""


class FakeCuda(StorageTracker):
    """The allocator of a card: it reserves whole segments of 2 MiB, and keeps them."""

    def __init__(self, limit_bytes: int = CAPACITY_BYTES) -> None:
        """`limit_bytes` is what of the card the process may reserve."""
        super().__init__("cpu")
        self.limit_bytes = limit_bytes
        self.backend = "native"
        self.events: list[dict[str, Any]] | None = None
        """The history, where it is recorded."""
        self.history: list[dict[str, Any]] = []
        self.reserved_bytes = 0
        self._reserved_peak = 0
        self.retries = 0

    def _note_peak(self) -> None:
        super()._note_peak()
        needed = -(-self.live_bytes // SEGMENT_BYTES) * SEGMENT_BYTES
        if needed <= self.reserved_bytes:
            return
        if needed > self.limit_bytes:
            self.retries += 1
            raise torch.OutOfMemoryError(self._words(needed - self.reserved_bytes))
        if self.events is not None:
            size = needed - self.reserved_bytes
            new = {"action": "segment_alloc", "addr": self.reserved_bytes, "size": size}
            self.events.append(new | {"stream": 0, "frames": []})
        self.reserved_bytes = needed
        self._reserved_peak = max(self._reserved_peak, needed)

    def _words(self, asked: int) -> str:
        told = {
            "asked": asked,
            "total": CAPACITY_BYTES,
            "free": self.limit_bytes - self.reserved_bytes,
            "used": self.reserved_bytes + CONTEXT_BYTES,
            "allocated": self.live_bytes,
            "cached": self.reserved_bytes - self.live_bytes,
        }
        return NO_MEMORY.format(**{k: f"{v / MIB:.2f} MiB" for k, v in told.items()})

    def cuda_memoryStats(self, device: int) -> dict[str, Any]:  # noqa: N802
        return {
            "num_alloc_retries": self.retries,
            "num_ooms": 0,
            "allocated_bytes": _pools(self.live_bytes, self._peak_bytes),
            "requested_bytes": _pools(self.live_bytes, self._peak_bytes),
            "active_bytes": _pools(self.live_bytes, self._peak_bytes),
            "inactive_split_bytes": _pools(0, 0),
            "reserved_bytes": _pools(self.reserved_bytes, self._reserved_peak),
        }

    def cuda_resetPeakMemoryStats(self, device: int) -> None:  # noqa: N802
        self._peak_bytes = self.live_bytes
        self._reserved_peak = self.reserved_bytes

    def cuda_memorySnapshot(self, mempool_id: Any) -> dict[str, Any]:  # noqa: N802
        self._need_native("snapshot")
        count = self.reserved_bytes // SEGMENT_BYTES
        segment = {"segment_type": "large", "total_size": SEGMENT_BYTES, "blocks": []}
        return {"segments": [segment] * count, "device_traces": [self.events or []]}

    def cuda_record_memory_history(  # noqa: PLR0913 - torch's
        self,
        enabled: str | None,
        context: str | None,
        stacks: str,
        max_entries: int,
        clear_history: bool,
        compile_context: bool,
        global_record_annotations: bool,
        skip_actions: list[str],
    ) -> None:
        self._need_native("record")
        # torch/csrc/cuda/memory_snapshot.cpp, `_record_memory_history`.
        assert enabled in (None, "state", "all")
        assert context in (None, "state", "alloc", "all")
        assert stacks in ("python", "all")
        self.events = None if enabled is None else []

    def cuda_getAllocatorBackend(self) -> str:  # noqa: N802
        return self.backend

    def _need_native(self, what: str) -> None:
        if self.backend != "native":
            raise RuntimeError(f"cudaMallocAsync does not yet support {what}")


PLAYED = tuple(name for name in vars(FakeCuda) if name.startswith("cuda_"))
"""The functions of torch._C that are played, without their first underscore."""


def _pools(current: int, peak: int) -> dict[str, dict[str, int]]:
    counted = {"current": current, "peak": peak, "allocated": peak, "freed": 0}
    return {pool: dict(counted) for pool in ("all", "small_pool", "large_pool")}


class FakeNvml:
    """A driver that sees this process, and others, on one card."""

    class NVMLError(Exception):
        """What it raises."""

    def __init__(self, cuda: FakeCuda, *, names_processes: bool = True) -> None:
        self._cuda = cuda
        self._names_processes = names_processes
        self.is_initialized = False

    @property
    def _own_bytes(self) -> int:
        if not self.is_initialized:
            return 0
        return self._cuda.reserved_bytes + CONTEXT_BYTES

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"card {index}"

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(used=OTHERS_BYTES + self._own_bytes)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        own = self._own_bytes if self._names_processes else None
        return [
            SimpleNamespace(pid=1, usedGpuMemory=OTHERS_BYTES),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=own),
        ]

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65"


@contextlib.contextmanager
def installed(
    cuda: FakeCuda, nvml: FakeNvml, patch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A process that finds the card, and its driver, in the place of none."""

    @contextlib.contextmanager
    def session() -> Iterator[FakeNvml]:
        yield nvml

    def init() -> None:
        nvml.is_initialized = True

    properties = SimpleNamespace(
        name=CARD, total_memory=CAPACITY_BYTES, major=8, minor=0
    )
    for name in PLAYED:
        patch.setattr(torch._C, f"_{name}", getattr(cuda, name), raising=False)
    memory = torch.cuda.memory
    patch.setattr(memory, "is_initialized", lambda: nvml.is_initialized)
    patch.setattr(memory, "_get_device_index", lambda *args, **kwargs: 0)
    for name, answer in {
        "init": init,
        "is_initialized": lambda: nvml.is_initialized,
        "synchronize": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: properties,
    }.items():
        patch.setattr(torch.cuda, name, answer)
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    patch.setattr(cuda_meter, "nvml_session", session)
    patch.setattr("memplan.profiler.environment.nvml_session", session)
    patch.setattr(child, "_device", lambda task: torch.device("cpu"))
    yield


STUBS = Path(torch.__file__).parent / "_C" / "__init__.pyi"
"""What torch says of its functions in C++."""
