"""A run on a card, from its first phase to its record, over an allocator played."""

from __future__ import annotations

import ast
import gzip
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import (
    CARD,
    CONTEXT_BYTES,
    OTHERS_BYTES,
    PLAYED,
    SEGMENT_BYTES,
    STUBS,
    FakeCuda,
    FakeNvml,
    installed,
)
from small import events_of, task

from memplan import profiler
from memplan.errors import InputError
from memplan.footprint import Moment
from memplan.profile import Profile
from memplan.profiler import child
from memplan.profiler.task import Journal, Task, read_events
from memplan.units import GIB, MIB

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(
    asked: Task,
    folder: Path,
    cuda: FakeCuda,
    nvml: FakeNvml | None = None,
) -> Profile:
    """The record of a run in this process, whatever its outcome."""
    file = folder / "journal.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["child", str(file)])
        patch.setattr("sys.stdin", _Given(asked.to_line()))
        patch.setattr(child, "_end_with_parent", lambda: None)
        with installed(cuda, nvml or FakeNvml(cuda), patch), cuda:
            child.main()
    found = profiler.Found.of(read_events(file))
    return profiler.profile_of(asked, "one", found)


class _Given:
    """Standard input of one line."""

    def __init__(self, line: str) -> None:
        self._line = line

    def readline(self) -> str:
        return self._line


@pytest.mark.parametrize("name", PLAYED)
def test_what_is_played_takes_what_torch_s_stubs_name(name: str) -> None:
    tree = ast.parse(STUBS.read_text(encoding="utf-8"))
    (stub,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == f"_{name}"
    )

    ours = list(inspect.signature(getattr(FakeCuda, name)).parameters)[1:]

    assert ours == [argument.arg for argument in stub.args.args]


@pytest.fixture(scope="module")
def on_card(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return run(task(device="cuda"), tmp_path_factory.mktemp("card"), FakeCuda())


def moments_of(record: Profile) -> Mapping[str, Moment]:
    assert record.footprint is not None
    return {moment.label: moment for moment in record.footprint.moments}


def test_each_phase_has_the_allocator_s_peak_within_it(
    on_card: Profile, tmp_path: Path
) -> None:
    """As the CPU's meter reads the same tensors; no other phase's peak is in it."""
    by_tensors = {
        event["label"]: event
        for event in events_of(task(), tmp_path)
        if event["event"] == "moment"
    }
    found = moments_of(on_card)

    assert on_card.outcome == "ok"
    assert found.keys() == by_tensors.keys()
    for label, moment in found.items():
        read = by_tensors[label]
        # The generator's state is no tensor of the model's.
        assert moment.allocated_bytes == pytest.approx(
            read["allocated_bytes"], abs=2048
        ), label
        assert moment.end_allocated_bytes == pytest.approx(
            read["end_allocated_bytes"], abs=2048
        ), label
        assert moment.reserved_bytes % SEGMENT_BYTES == 0
    assert found["1.optimizer"].allocated_bytes < found["1.backward"].allocated_bytes


def test_the_record_names_the_card_and_its_context(on_card: Profile) -> None:
    assert on_card.gpu is not None
    assert (on_card.device, on_card.card) == ("cuda", CARD)
    assert on_card.gpu.context_bytes == CONTEXT_BYTES
    assert on_card.gpu.compute_capability == (8, 0)
    assert on_card.environment["driver"] == "580.65"
    reserved = max(m.reserved_bytes for m in moments_of(on_card).values())
    assert on_card.driver == {
        "card_used_before_bytes": OTHERS_BYTES,
        "card_used_bytes": OTHERS_BYTES + CONTEXT_BYTES + reserved,
        "process_bytes": CONTEXT_BYTES + reserved,
    }
    assert on_card.segments["large_bytes"] == reserved
    assert on_card.counters["1.forward"]["retries"] == 0
    assert Profile.from_json(json.loads(json.dumps(on_card.to_json()))) == on_card


def test_in_a_container_the_context_is_what_the_card_holds_more(tmp_path: Path) -> None:
    cuda = FakeCuda()
    record = run(
        task(device="cuda"), tmp_path, cuda, FakeNvml(cuda, names_processes=False)
    )

    assert "process_bytes" not in record.driver
    assert record.gpu is not None
    assert record.gpu.context_bytes == CONTEXT_BYTES


def test_a_process_that_is_on_the_card_already_tells_no_context_there(
    tmp_path: Path,
) -> None:
    """As a user's own training is: what was used before is not known any more."""
    cuda = FakeCuda()
    nvml = FakeNvml(cuda, names_processes=False)
    nvml.is_initialized = True
    record = run(task(device="cuda"), tmp_path, cuda, nvml)

    assert "card_used_before_bytes" not in record.driver
    assert record.gpu is not None
    assert record.gpu.assumptions == ("The CUDA context was not measured.",)


def test_running_out_is_an_outcome_with_the_allocator_s_own_figures(
    tmp_path: Path,
) -> None:
    """What failed, in torch's words, whole; what was held then; moments before it."""
    enough = run(task(device="cuda"), tmp_path, FakeCuda())
    peak = max(m.reserved_bytes for m in moments_of(enough).values())
    (tmp_path / "less").mkdir()
    asked = task({"sequence_length": 48, "batch_size": 8}, device="cuda")

    record = run(asked, tmp_path / "less", FakeCuda(peak))

    assert record.outcome == "out-of-memory"
    assert record.message.startswith("CUDA out of memory. Tried to allocate 2.00 MiB.")
    assert record.message.endswith(
        "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
    )
    assert record.footprint is not None
    failed = record.footprint.failed_moment
    assert failed in ("1.forward", "1.backward")
    assert [m.label for m in record.footprint.moments][:2] == ["load", "adapt"]
    assert record.counters[failed]["retries"] >= 1
    assert record.counters["adapt"]["retries"] == 0
    assert record.segments["large_bytes"] == peak
    assert record.driver["process_bytes"] == peak + CONTEXT_BYTES
    assert record.gpu is not None
    assert "The CUDA context was not measured." in record.gpu.assumptions


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_the_driver_and_its_libraries_run_out_in_other_words(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.AcceleratorError(words)

    monkeypatch.setattr(child.loops, "train", fail)

    record = run(task(device="cuda"), tmp_path, FakeCuda())

    assert record.outcome == "out-of-memory"
    assert words.splitlines()[0] in record.message


def test_a_trace_is_kept_beside_the_record(tmp_path: Path) -> None:
    file = tmp_path / "traces" / "one.jsonl.gz"
    cuda = FakeCuda()
    record = run(task(device="cuda", trace=str(file)), tmp_path, cuda)

    assert record.trace == str(file)
    with gzip.open(file, "rt") as opened:
        rows = [json.loads(line) for line in opened]
    assert {action for action, _, _ in rows} == {"segment_alloc"}
    assert sum(size for _, _, size in rows) == cuda.reserved_bytes
    assert cuda.events is None


def test_a_trace_that_cannot_be_written_is_said_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    file = tmp_path / "traces" / "one.jsonl.gz"
    monkeypatch.setattr(Path, "replace", full)
    record = run(task(device="cuda", trace=str(file)), tmp_path, FakeCuda())

    assert record.outcome == "failed"
    assert "No space left on device" in record.message
    assert record.footprint is not None
    assert list(file.parent.iterdir()) == []


def test_another_allocator_has_neither_segments_nor_a_trace(tmp_path: Path) -> None:
    cuda = FakeCuda()
    cuda.backend = "cudaMallocAsync"
    record = run(task(device="cuda"), tmp_path, cuda)
    (tmp_path / "trace").mkdir()
    refused = task(device="cuda", trace=str(tmp_path / "trace" / "one.gz"))

    assert (record.outcome, record.segments) == ("ok", {})
    assert any("cudaMallocAsync" in note for note in record.notes)
    with (
        pytest.MonkeyPatch.context() as patch,
        installed(cuda, FakeNvml(cuda), patch),
        pytest.raises(InputError, match="--trace: 'cudaMallocAsync'"),
    ):
        child.run(refused, Journal(tmp_path / "trace" / "journal.jsonl"))


def test_a_large_card_is_enough(on_card: Profile) -> None:
    assert on_card.gpu is not None
    assert on_card.gpu.capacity_bytes == 80 * GIB
    assert max(m.allocated_bytes for m in moments_of(on_card).values()) < 100 * MIB
