"""What torch's CUDA allocator counts, and what the driver says beside it.

Source: torch.cuda.memory_stats_as_nested_dict (memory_stats makes hundreds of names of
it, which takes fifty times as long), reset_peak_memory_stats, memory_snapshot,
memory._record_memory_history; NVML's memory of the device and of its processes.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from memplan.errors import InputError
from memplan.gpu import nvml_session, visible_device
from memplan.profiler.meter import Meter, Reading

MOST_EVENTS = 2_000_000
"""Events of the allocator that a trace keeps: beyond them the oldest are lost."""

NATIVE = "native"
"""What torch calls its own allocator, which alone has snapshots and a history
(c10/cuda/CUDAMallocAsyncAllocator.cpp raises for both)."""

COUNTERS = {
    "requested_bytes": ("requested_bytes", "peak"),
    "active_bytes": ("active_bytes", "peak"),
    "inactive_split_bytes": ("inactive_split_bytes", "peak"),
    "reserved_end_bytes": ("reserved_bytes", "current"),
}
"""A statistic, and which of its values, of all pools together."""

RETRIES = "num_alloc_retries"
"""How often the allocator gave its cache back since the process began."""


class CudaMeter(Meter):
    """Reads the allocator's statistics; peaks are reset at the start of each moment."""

    def __init__(self, trace: str = "") -> None:
        self._trace = trace
        self._used_before: int | None = None
        self._retries_before = 0

    def reset(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._retries_before = torch.cuda.memory_stats_as_nested_dict()[RETRIES]

    def read(self) -> Reading:
        # What failed may have left the device in a state that answers nothing.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        stats = torch.cuda.memory_stats_as_nested_dict()
        return Reading(
            allocated_bytes=stats["allocated_bytes"]["all"]["peak"],
            reserved_bytes=stats["reserved_bytes"]["all"]["peak"],
            end_allocated_bytes=stats["allocated_bytes"]["all"]["current"],
            counters={
                **{
                    name: stats[statistic]["all"][value]
                    for name, (statistic, value) in COUNTERS.items()
                },
                "retries": stats[RETRIES] - self._retries_before,
            },
        )

    def hold(self, tensors: Iterable[Any]) -> None:
        """The allocator knows of all that it handed out."""

    def finish(self, optimizer: Any) -> dict[str, Any]:
        """Segments, the driver's view, paged bytes and the context between them."""
        torch.cuda.synchronize()
        reserved_bytes = torch.cuda.memory_reserved()
        paged_bytes = paged_state_bytes(optimizer)
        driver, note = read_driver(self._used_before)
        segments, other = read_segments()
        return {
            "segments": segments,
            "driver": driver,
            "paged_bytes": paged_bytes,
            "context_bytes": context_bytes(driver, reserved_bytes, paged_bytes),
            "notes": [text for text in (note, other) if text],
        }

    def __enter__(self) -> CudaMeter:
        # A process that is already on the card cannot tell what was there before it.
        if not torch.cuda.is_initialized():
            self._used_before = used_on_card()
        torch.cuda.init()
        if self._trace:
            _check_traceable()
            torch.cuda.memory._record_memory_history(
                max_entries=MOST_EVENTS, context=None, stacks="python"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._trace:
            write_trace(torch.cuda.memory._snapshot(), Path(self._trace))
            torch.cuda.memory._record_memory_history(enabled=None)


def _check_traceable() -> None:
    backend = torch.cuda.get_allocator_backend()
    if backend != NATIVE:
        raise InputError(
            "--trace",
            backend,
            "keeps no history of its events",
            "leave out the option, or the backend in PYTORCH_ALLOC_CONF",
        )


def read_segments() -> tuple[dict[str, int], str]:
    """What the allocator's snapshot holds, and a note where there is none."""
    backend = torch.cuda.get_allocator_backend()
    if backend != NATIVE:
        return {}, f"The allocator is {backend}, which has no segments to be counted."
    return count_segments(torch.cuda.memory_snapshot()), ""


def count_segments(segments: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many segments a snapshot holds of either pool, and their bytes."""
    found = {
        "small": 0,
        "large": 0,
        "small_bytes": 0,
        "large_bytes": 0,
        "largest_bytes": 0,
    }
    for segment in segments:
        pool, size = segment["segment_type"], int(segment["total_size"])
        found[pool] += 1
        found[f"{pool}_bytes"] += size
        found["largest_bytes"] = max(found["largest_bytes"], size)
    return found


def paged_state_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state in managed memory, which no allocator counts.

    bitsandbytes marks such tensors (`functional.get_paged`).
    """
    if optimizer is None:
        return 0
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and getattr(value, "is_paged", False)
    )


def context_bytes(
    driver: Mapping[str, int], reserved_bytes: int, paged_bytes: int
) -> int | None:
    """What the driver counts for this process beyond the allocator and paged state.

    By the process's own reading where NVML gives it, which leaves managed memory out
    (measured on an H100, driver 580); else by what the card held more than before this
    process came, which has it, and which others may have changed meanwhile.
    """
    if "process_bytes" in driver:
        return max(0, driver["process_bytes"] - reserved_bytes)
    if "card_used_before_bytes" not in driver:
        return None
    used = driver["card_used_bytes"] - driver["card_used_before_bytes"]
    return max(0, used - reserved_bytes - paged_bytes)


def read_driver(used_before: int | None) -> tuple[dict[str, int], str]:
    """The driver's view after a step, and a note where NVML does not give it."""
    found: dict[str, int] = {}
    if used_before is not None:
        found["card_used_before_bytes"] = used_before
    try:
        with nvml_session() as nvml:
            handle, _ = visible_device(nvml)
            found["card_used_bytes"] = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
            own = own_bytes(nvml, handle)
    except InputError as error:
        free, total = torch.cuda.mem_get_info()
        found["card_used_bytes"] = total - free
        return found, (
            f"NVML gave no reading ({error}); the card's use is that of all processes."
        )
    if own is None:
        return found, (
            "NVML does not tell this process's own memory here, as in containers."
        )
    return {**found, "process_bytes": own}, ""


def own_bytes(nvml: Any, handle: Any) -> int | None:
    """What NVML counts for this process; None where it does not name it."""
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    for process in processes:
        if process.pid == os.getpid() and process.usedGpuMemory is not None:
            return int(process.usedGpuMemory)
    return None


def used_on_card() -> int | None:
    """What is used on the card before this process comes; None without NVML."""
    try:
        with nvml_session() as nvml:
            handle, _ = visible_device(nvml)
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    except InputError:
        return None


def write_trace(snapshot: Mapping[str, Any], file: Path) -> None:
    """The allocator's events in order, [action, address, bytes] a line, gzipped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    events = snapshot["device_traces"][torch.cuda.current_device()]
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with gzip.open(temporary, "wt", encoding="utf-8") as opened:
            for event in events:
                row = [event["action"], event.get("addr"), event.get("size")]
                opened.write(json.dumps(row) + "\n")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
