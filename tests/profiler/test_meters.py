"""What the meters read: of tensors on a CPU, and of CUDA's allocator by a fake."""

from __future__ import annotations

import gzip
import json
import os
import statistics
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocation_reader import ProfilerMeter

from memplan.errors import InputError
from memplan.profiler import cuda_meter
from memplan.profiler.cpu_meter import CpuMeter
from memplan.profiler.cuda_meter import (
    CudaMeter,
    context_bytes,
    count_segments,
    own_bytes,
    paged_state_bytes,
    read_driver,
    write_trace,
)
from memplan.profiler.meter import Moments
from memplan.profiler.task import Journal
from memplan.units import MIB

KILO_FLOATS = 4000


def test_tensors_count_from_birth_to_death_and_views_once() -> None:
    with CpuMeter() as meter:
        kept = torch.ones(1000)
        view = kept.view(10, 100)
        meter.reset()
        dropped = view + 1
        del dropped
        reading = meter.read()

    assert reading.allocated_bytes == 2 * KILO_FLOATS
    assert reading.end_allocated_bytes == KILO_FLOATS
    assert reading.counters["resident_bytes"] > MIB


def test_tensors_made_elsewhere_count_when_they_are_used() -> None:
    made = torch.ones(1000)
    with CpuMeter() as meter:
        meter.reset()
        result = made + 1
        reading = meter.read()

    assert reading.end_allocated_bytes == 2 * KILO_FLOATS
    del result


def test_what_autograd_saves_is_seen_until_backward_lets_it_go() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with CpuMeter() as meter:
        loss = weight.exp().sum()
        meter.reset()
        before = meter.read().end_allocated_bytes
        loss.backward()
        del loss
        after = meter.read().end_allocated_bytes

    # The weight, exp's result and the loss; then the weight and its gradient.
    assert (before, after) == (2 * KILO_FLOATS + 4, 2 * KILO_FLOATS)


def dense(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Two gradients of the weight, each a tensor of its own."""
    return weight.sin().sum() + weight.exp().sum()


def tied(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As an embedding that is the head too: the head's gradient is a view."""
    rows = torch.nn.functional.embedding(torch.arange(8), weight)
    return (rows @ x @ weight.t()).sum()


def peak_of_backward(
    meter: CpuMeter | ProfilerMeter,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> int:
    """Bytes; nothing outlives it, as the profiler counts what dies late by address."""
    weight = torch.ones(1000, 50, requires_grad=True)
    x = torch.ones(50, 50)
    with meter:
        meter.hold((weight, x))
        loss = loss_of(weight, x)
        meter.reset()
        before = meter.read()
        meter.reset()
        loss.backward()
        reading = meter.read()
    if isinstance(meter, CpuMeter):
        assert before.end_allocated_bytes < reading.allocated_bytes
        return reading.allocated_bytes
    # What was made before the profile began is not in it.
    return meter.peaks()[1][0] + weight.nbytes + x.nbytes


@pytest.mark.parametrize("loss_of", [dense, tied])
def test_sums_of_gradients_take_what_the_engine_takes(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """It adds in place, as torch's profiler sees, but for views."""
    seen = peak_of_backward(ProfilerMeter(), loss_of)

    assert peak_of_backward(CpuMeter(), loss_of) == pytest.approx(seen, rel=0.01)


def test_nothing_of_the_meta_device_counts() -> None:
    with CpuMeter() as meter:
        torch.ones(1000, device="meta") + 1

        assert meter.read().allocated_bytes == 0


STATS = {
    "allocated_bytes": {"all": {"peak": 70, "current": 50}},
    "reserved_bytes": {"all": {"peak": 90, "current": 80}},
    "requested_bytes": {"all": {"peak": 65, "current": 45}},
    "active_bytes": {"all": {"peak": 75, "current": 55}},
    "inactive_split_bytes": {"all": {"peak": 5, "current": 5}},
    "num_alloc_retries": 2,
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA that notes what is called and has STATS to tell."""
    calls: list[str] = []
    for name, answer in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_stats_as_nested_dict": STATS,
        "memory_reserved": 80,
        "memory_snapshot": [{"segment_type": "large", "total_size": 80}],
        "mem_get_info": (100, 1000),
        "init": None,
        "current_device": 0,
        "get_allocator_backend": "native",
    }.items():
        monkeypatch.setattr(
            torch.cuda,
            name,
            lambda *args, _name=name, _answer=answer: (calls.append(_name), _answer)[1],
        )
    return calls


def test_peaks_are_read_before_they_are_reset(card: list[str]) -> None:
    meter = CudaMeter()
    meter.reset()
    reading = meter.read()

    assert card == [
        *("synchronize", "reset_peak_memory_stats", "memory_stats_as_nested_dict"),
        *("synchronize", "memory_stats_as_nested_dict"),
    ]
    assert (reading.allocated_bytes, reading.reserved_bytes) == (70, 90)
    assert reading.end_allocated_bytes == 50
    assert reading.counters == {
        "requested_bytes": 65,
        "active_bytes": 75,
        "inactive_split_bytes": 5,
        "reserved_end_bytes": 80,
        "retries": 0,
    }


Memory = namedtuple("Memory", "used")
Process = namedtuple("Process", "pid usedGpuMemory")


class Nvml:
    """A driver that counts 500 on its only card, for the processes that it is given."""

    class NVMLError(Exception):
        """What it raises."""

    def __init__(self, *processes: Process) -> None:
        self.processes = list(processes)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"card {index}"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Memory:  # noqa: N802
        return Memory(500)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Process]:  # noqa: N802
        return self.processes


def with_driver(monkeypatch: pytest.MonkeyPatch, nvml: Nvml | None) -> None:
    class Session:
        def __enter__(self) -> Nvml:
            if nvml is None:
                raise InputError("--gpu", "auto", "finds no NVIDIA driver", "give one")
            return nvml

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cuda_meter, "nvml_session", Session)


OWN = Process(os.getpid(), 300)
OTHER = Process(1, 150)


def test_the_driver_s_own_reading_of_the_process_comes_first(
    monkeypatch: pytest.MonkeyPatch, card: list[str]
) -> None:
    with_driver(monkeypatch, Nvml(OTHER, OWN))
    driver, note = read_driver(used_before=170)

    assert driver == {
        "card_used_before_bytes": 170,
        "card_used_bytes": 500,
        "process_bytes": 300,
    }
    assert note == ""
    assert context_bytes(driver, reserved_bytes=80, paged_bytes=20) == 220


def test_in_a_container_the_card_s_reading_stands_in(
    monkeypatch: pytest.MonkeyPatch, card: list[str]
) -> None:
    with_driver(monkeypatch, Nvml(OTHER, Process(os.getpid(), None)))
    driver, note = read_driver(used_before=170)

    assert "process_bytes" not in driver
    assert "containers" in note
    assert context_bytes(driver, reserved_bytes=80, paged_bytes=20) == 500 - 170 - 100


def test_without_nvml_torch_s_reading_of_the_card_is_kept_and_said(
    monkeypatch: pytest.MonkeyPatch, card: list[str]
) -> None:
    with_driver(monkeypatch, None)
    driver, note = read_driver(used_before=None)

    assert driver == {"card_used_bytes": 900}
    assert "finds no NVIDIA driver" in note
    assert context_bytes(driver, reserved_bytes=80, paged_bytes=0) is None


def test_a_driver_that_refuses_to_list_processes_names_none() -> None:
    class Refusing(Nvml):
        def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Process]:  # noqa: N802
            raise self.NVMLError

    assert own_bytes(Refusing(), "card 0") is None


def test_the_finish_holds_all_that_is_read_once(
    monkeypatch: pytest.MonkeyPatch, card: list[str]
) -> None:
    with_driver(monkeypatch, Nvml(OWN))
    finish = CudaMeter().finish(None)

    assert finish["context_bytes"] == 220
    assert finish["segments"]["large_bytes"] == 80
    assert json.loads(json.dumps(finish)) == finish


def test_segments_are_counted_by_pool() -> None:
    segments = [
        {"segment_type": "small", "total_size": 2 * MIB},
        {"segment_type": "large", "total_size": 20 * MIB},
        {"segment_type": "large", "total_size": 34 * MIB},
    ]

    assert count_segments(segments) == {
        "small": 1,
        "large": 2,
        "small_bytes": 2 * MIB,
        "large_bytes": 54 * MIB,
        "largest_bytes": 34 * MIB,
    }


def test_paged_state_is_what_bitsandbytes_marks() -> None:
    paged, plain = torch.zeros(100, dtype=torch.uint8), torch.zeros(50)
    paged.is_paged = True  # type: ignore[attr-defined]
    optimizer = SimpleNamespace(state={"p": {"state1": paged, "absmax": plain, "n": 1}})

    assert paged_state_bytes(optimizer) == 100
    assert paged_state_bytes(None) == 0


def test_a_trace_is_rows_of_action_address_and_bytes(
    tmp_path: Path, card: list[str]
) -> None:
    events = [
        {"action": "segment_alloc", "addr": 4096, "size": 2 * MIB, "stream": 0},
        {"action": "alloc", "addr": 4096, "size": 512, "frames": []},
    ]
    file = tmp_path / "traces" / "one.jsonl.gz"
    write_trace({"device_traces": [events]}, file)

    with gzip.open(file, "rt") as opened:
        rows = [json.loads(line) for line in opened]
    assert rows == [["segment_alloc", 4096, 2 * MIB], ["alloc", 4096, 512]]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def nested_stats(retries: int, ooms: int) -> dict[str, Any]:
    """What the allocator hands to Python (torch 2.13, csrc/cuda/Module.cpp)."""

    def pools(peak: int) -> dict[str, dict[str, int]]:
        counted = {"current": peak // 2, "peak": peak, "allocated": peak, "freed": 0}
        return dict.fromkeys(("all", "small_pool", "large_pool"), counted)

    flat = {"current": 0, "peak": 0, "allocated": 0, "freed": 0}
    return {
        "num_alloc_retries": retries,
        "num_ooms": ooms,
        "num_sync_all_streams": 0,
        "num_device_alloc": 3,
        "num_device_free": 0,
        "max_split_size": -1,
        "allocation": pools(10),
        "segment": pools(4),
        "active": pools(10),
        "inactive_split": pools(2),
        "allocated_bytes": pools(70 * MIB),
        "reserved_bytes": pools(90 * MIB),
        "active_bytes": pools(75 * MIB),
        "inactive_split_bytes": pools(5 * MIB),
        "requested_bytes": pools(65 * MIB),
        "oversize_allocations": flat,
        "oversize_segments": flat,
        "pools": {(0, 1): {"reserved_bytes": pools(2 * MIB)}},
    }


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own functions over an allocator that is not there."""
    stats = nested_stats(retries=2, ooms=1)
    segment = {
        "device": 0,
        "address": 4096,
        "total_size": 20 * MIB,
        "allocated_size": 16 * MIB,
        "active_size": 16 * MIB,
        "requested_size": 15 * MIB,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": [{"size": 16 * MIB, "state": "active_allocated", "frames": []}],
    }
    cuda = torch.cuda.memory
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "_get_device_index", lambda *args, **kwargs: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, answer in {
        "_cuda_memoryStats": stats,
        "_cuda_memorySnapshot": {"segments": [segment], "device_traces": [[]]},
        "_cuda_getAllocatorBackend": "native",
    }.items():
        monkeypatch.setattr(
            torch._C, name, lambda *args, _answer=answer: _answer, raising=False
        )


def test_torch_s_own_statistics_have_every_counter(allocator: None) -> None:
    reading = CudaMeter().read()

    assert reading.allocated_bytes == 70 * MIB
    assert reading.reserved_bytes == 90 * MIB
    assert reading.end_allocated_bytes == 35 * MIB
    assert reading.counters == {
        "requested_bytes": 65 * MIB,
        "active_bytes": 75 * MIB,
        "inactive_split_bytes": 5 * MIB,
        "reserved_end_bytes": 45 * MIB,
        "retries": 2,
    }


def test_retries_are_those_of_the_moment(
    allocator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator counts them from when the process began."""
    meter = CudaMeter()
    monkeypatch.setattr(
        torch._C, "_cuda_resetPeakMemoryStats", lambda device: None, raising=False
    )
    meter.reset()
    before = meter.read().counters["retries"]
    more = nested_stats(retries=5, ooms=1)
    monkeypatch.setattr(torch._C, "_cuda_memoryStats", lambda device: more)

    assert (before, meter.read().counters["retries"]) == (0, 3)


def test_reading_a_step_takes_little_of_the_host(
    allocator: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without what synchronising costs: that is known on a card alone."""
    monkeypatch.setattr(
        torch._C, "_cuda_resetPeakMemoryStats", lambda device: None, raising=False
    )
    moments = Moments(CudaMeter(), Journal(tmp_path / "journal.jsonl"))
    seconds = []
    for step in range(1, 51):
        started = time.perf_counter()
        moments.begin_step()
        for phase in ("forward", "backward", "clip", "optimizer"):
            moments.begin_phase(step, phase)
        moments.end_step(step, 1.0)
        seconds.append(time.perf_counter() - started)

    assert statistics.median(seconds) < 0.02 * SHORT_STEP_SECONDS


SHORT_STEP_SECONDS = 0.05
"""A step of a small model over a few hundred tokens, on a card."""


def test_torch_s_own_snapshot_is_counted(
    allocator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_driver(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * MIB, 1000 * MIB))

    finish = CudaMeter().finish(None)

    assert finish["segments"]["large"] == 1
    assert finish["segments"]["large_bytes"] == 20 * MIB
    assert finish["driver"] == {"card_used_bytes": 900 * MIB}
    assert finish["context_bytes"] is None
    (note,) = finish["notes"]
    assert "NVML gave no reading" in note


def test_a_device_that_fails_still_gives_what_was_counted(
    allocator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an illegal access, when nothing synchronises any more."""

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)

    assert CudaMeter().read().reserved_bytes == 90 * MIB
