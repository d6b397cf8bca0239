"""`measure`: a real short fine-tune in a process of its own, and what memory it took.

Nothing here imports torch: the process that measures does.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memplan.architecture import Architecture
from memplan.errors import InputError, MeasurementError
from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu, find_gpu
from memplan.inference import NONE
from memplan.profile import Profile, slug
from memplan.profiler.task import Task, read_events
from memplan.recipe import Recipe

SOURCE = "memplan profile"

POLL_SECONDS = 0.1
"""How often the measuring process's journal is looked at."""

GRACE_SECONDS = 10.0
"""What a process is given beyond its time limit to end its step."""

IMPORTS = "imports"
"""What a process does before its first moment."""

OUTPUT_CHARACTERS = 2000
"""How much of what a failed process printed is looked at."""

_PACKAGES_FOLDER = Path(__file__).resolve().parents[2]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a run was measured: the run, with what it had finished."""

    def __init__(self, run: Profile) -> None:
        super().__init__()
        self.run = run


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Where to measure, and the card's name as far as NVML tells it."""

    kind: str
    """`cuda` or `cpu`."""
    card: str
    note: str = ""
    """Why it is a CPU, where a card was looked for."""

    @classmethod
    def find(cls, asked: str) -> Device:
        """The device that is asked for; `auto` is a card where a driver has one."""
        if asked == "cpu":
            return cls(kind="cpu", card="cpu")
        try:
            return cls(kind="cuda", card=find_gpu("auto").name)
        except InputError as error:
            if asked == "cuda":
                return cls(kind="cuda", card="cuda")
            note = f"no card to measure on ({error}); measuring on the CPU, "
            return cls(
                kind="cpu",
                card="cpu",
                note=f"{note}which tells the bytes of tensors alone",
            )


def measure(
    architecture: Architecture, recipe: Recipe, *, device: str = "auto", steps: int = 3
) -> Profile:
    """A real short fine-tune with random weights, in a process of its own.

    `device` is `cuda`, `cpu`, or `auto`: a card where there is one. Running out of
    memory is an outcome. Raises InputError for what cannot be run as asked, and
    MeasurementError where the process dies.

    >>> import json, memplan, pathlib, tempfile
    >>> config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "config.json"
    ...     _ = file.write_text(json.dumps(config))
    ...     small = memplan.inspect(str(file))
    >>> run = memplan.measure(small, memplan.Recipe(sequence_length=16), device="cpu")
    >>> run.outcome, len(run.losses)
    ('ok', 3)
    """
    found = Device.find(device)
    task = Task(
        model=architecture.name,
        config=architecture.config,
        recipe=recipe,
        device=found.kind,
        steps=steps,
    )
    run = run_task(task, name_of(task, found.card, {}))
    raise_outcome(run)
    return run


def run_task(
    task: Task,
    name: str,
    *,
    progress: Callable[[str], None] = lambda label: None,
    time_limit: float | None = None,
) -> Profile:
    """The measured run of a task, whatever its outcome, under that name.

    Raises InputError for a task that cannot be run as asked, and Interrupted for
    Ctrl-C.
    """
    with tempfile.TemporaryDirectory(
        prefix="memplan-", ignore_cleanup_errors=True
    ) as folder:
        told = replace(task, folder=folder, seconds=time_limit)
        journal = Path(folder) / "journal.jsonl"
        output = Path(folder) / "output.txt"
        interrupted = False
        with output.open("wb") as opened:
            process = _start(told, journal, opened)
            try:
                ended = _wait(process, journal, progress, time_limit)
            except KeyboardInterrupt:
                interrupted, ended = True, "interrupted"
            finally:
                _stop(process)
        found = Found.of(read_events(journal))
        _settle_outcome(found, process.returncode, ended, output)
        run = profile_of(task, name, found)
    if interrupted:
        raise Interrupted(run)
    return run


def name_of(task: Task, card: str, versions: Mapping[str, str]) -> str:
    """A name that says what is measured, and by its end all that it depends on."""
    told = {
        "task": replace(task, folder="", seconds=None, trace="").to_line(),
        "card": card,
        "versions": dict(versions),
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    recipe = task.recipe
    parts = (
        task.model.rpartition("/")[2].removesuffix(".json"),
        *_told_of(task),
        recipe.quantization,
        f"b{recipe.batch_size}-s{recipe.sequence_length}",
    )
    return f"{slug('-'.join(parts))}-{digest[:10]}"


def _told_of(task: Task) -> Iterator[str]:
    """What a run's name says of its method."""
    if task.inference is None:
        yield task.recipe.method
        return
    yield "inference"
    if task.inference.adapters != NONE:
        yield f"{task.recipe.method}-{task.inference.adapters}"


def _start(task: Task, journal: Path, output: Any) -> subprocess.Popen[bytes]:
    """The measuring process, in a session of its own so that Ctrl-C is ours to tell."""
    paths = (str(_PACKAGES_FOLDER), os.environ.get("PYTHONPATH", ""))
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if task.device == "cpu":
        # bitsandbytes would compile two kernels for CPUs, which takes longer than runs.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    else:
        # Trainer would spread a batch over every card that it sees.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
        # NVML counts cards by their place on the bus; CUDA the fastest first, unless
        # it is told: what is named, measured and read must be one card.
        order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        environment["CUDA_DEVICE_ORDER"] = order
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan.profiler.child", str(journal)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(task.to_line().encode())
        process.stdin.flush()
    return process


def _wait(
    process: subprocess.Popen[bytes],
    journal: Path,
    progress: Callable[[str], None],
    time_limit: float | None,
) -> str:
    """Waits for the process; `timed-out` where it was stopped, else nothing.

    Its time runs from when its libraries are loaded.
    """
    started: float | None = None
    known = ""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
            return ""
        label = _running(journal)
        if label != known:
            known = label
            progress(label or IMPORTS)
        if started is None and label:
            started = time.monotonic()
        elapsed = 0.0 if started is None else time.monotonic() - started
        if time_limit is not None and elapsed > time_limit + GRACE_SECONDS:
            return "timed-out"


def _running(journal: Path) -> str:
    """The moment that runs; nothing before the first."""
    labels = [e["label"] for e in read_events(journal) if e["event"] == "begin"]
    return labels[-1] if labels else ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


@dataclass(slots=True)
class Found:
    """What a journal tells of a run."""

    status: str = ""
    message: str = ""
    running: str = ""
    moments: dict[str, Moment] = field(default_factory=dict)
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    card: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    answer: Mapping[str, Any] = field(default_factory=dict)
    finish: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Found:
        """What those events tell, in their order."""
        found = cls()
        for event in events:
            found._take(dict(event))
        return found

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "begin":
            self.running = event["label"]
        elif kind == "moment":
            self._take_moment(event)
        elif kind == "step":
            self.step_seconds.append(event["seconds"])
            self.losses.append(event["loss"])
        elif kind == "outcome":
            self.status, self.message = event["status"], event["message"]
        elif kind == "environment":
            self.environment = event["values"]
        else:
            setattr(self, kind, event)

    def _take_moment(self, event: dict[str, Any]) -> None:
        counters = event.pop("counters")
        moment = Moment(**event)
        label = moment.label
        before = self.moments.get(label)
        self.moments[label] = before.merged(moment) if before else moment
        known = self.counters.setdefault(label, {})
        for name, value in counters.items():
            known[name] = max(known.get(name, 0), value)


def _settle_outcome(
    found: Found, returncode: int | None, ended: str, output: Path
) -> None:
    """Says how a process ended that could not say so itself; refusals are raised."""
    if found.status == "refused":
        raise InputError.from_message(found.message)
    if ended:
        found.status = ended
        found.message = f"stopped in {found.running or IMPORTS}"
    elif not found.status and returncode is not None and returncode < 0:
        found.status = "killed"
        found.message = (
            f"the measuring process died of {_signal(-returncode)} in "
            f"{found.running or IMPORTS}{_host_memory(returncode)}"
        )
    elif not found.status:
        found.status = "failed"
        found.message = f"exit code {returncode}: {_last_line(output)}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _host_memory(returncode: int) -> str:
    if -returncode != getattr(signal, "SIGKILL", None):
        return ""
    return ", as it does where the system runs out of memory"


def _last_line(output: Path) -> str:
    text = output.read_bytes()[-OUTPUT_CHARACTERS:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def profile_of(task: Task, name: str, found: Found, source: str = SOURCE) -> Profile:
    """The record of what a task's journal tells."""
    gpu = _gpu(found)
    context_bytes = found.finish.get("context_bytes")
    failed = found.status not in ("ok", "interrupted", "timed-out")
    footprint = None
    if found.moments:
        footprint = Footprint(
            moments=tuple(found.moments.values()),
            context_bytes=context_bytes,
            paged_bytes=found.finish.get("paged_bytes", 0),
            failed_moment=found.running if failed else None,
        )
    return Profile(
        id=name,
        source=source,
        device=task.device,
        model=task.model,
        config=dict(task.config),
        recipe=task.recipe,
        footprint=footprint,
        gpu=gpu,
        outcome=found.status,
        message=found.message,
        counters=found.counters,
        segments=found.finish.get("segments", {}),
        driver=found.finish.get("driver", {}),
        parameters=found.parameters,
        step_seconds=tuple(found.step_seconds),
        losses=tuple(found.losses),
        environment=found.environment,
        seed=task.seed,
        inference=task.inference,
        answer=found.answer,
        weights=task.weights,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        trace=task.trace,
        notes=tuple(_notes(task, found)),
    )


def _notes(task: Task, found: Found) -> Iterator[str]:
    yield from found.finish.get("notes", ())
    if task.device == "cpu":
        yield (
            "Measured on a CPU: bytes of tensors, without kernels' scratch, cache or "
            "context."
        )
    if task.weights == "random" and task.device == "cuda":
        yield (
            "Weights are random and drawn on the card: the load, and what it leaves in "
            "the allocator's cache, are not those of from_pretrained."
        )


def _gpu(found: Found) -> Gpu | None:
    """The card, its context as measured, else as the catalog plans it."""
    if found.card is None:
        return None
    told = found.card
    context_bytes = found.finish.get("context_bytes")
    assumptions: tuple[str, ...] = ()
    if context_bytes is None:
        planned = find_gpu(f"{told['capacity_bytes']}B")
        context_bytes = planned.context_bytes
        assumptions = ("The CUDA context was not measured.",)
    major, minor = told["compute_capability"]
    return Gpu(
        name=told["name"],
        capacity_bytes=told["capacity_bytes"],
        context_bytes=context_bytes,
        compute_capability=(major, minor),
        native_bf16=told["native_bf16"],
        assumptions=assumptions,
    )


def raise_outcome(run: Profile) -> None:
    """Raises MeasurementError for a run that neither ended well nor ran out."""
    if run.outcome in ("ok", "out-of-memory"):
        return
    raise MeasurementError(f"{run.id}: {run.outcome}: {run.message}")
