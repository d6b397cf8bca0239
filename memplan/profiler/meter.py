"""`Meter`: reads memory moment by moment, while a fine-tune runs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from torch import nn

from memplan.profiler.task import WARM_UP_STEPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The peaks of a moment that is over, and what is held at its end."""

    allocated_bytes: int
    reserved_bytes: int
    end_allocated_bytes: int
    counters: Mapping[str, int] = field(default_factory=dict)
    """Named as in memplan.profile.COUNTERS."""


class Meter(ABC):
    """Reads the peaks of one moment after another; is entered for as long as it does.

    `__enter__` and `__exit__` begin and end the watching.
    """

    @abstractmethod
    def reset(self) -> None:
        """Begins a moment: peaks are those from now on."""

    @abstractmethod
    def read(self) -> Reading:
        """The moment so far."""

    @abstractmethod
    def hold(self, tensors: Iterable[Any]) -> None:
        """Says that tensors are held which no operator may have touched yet."""

    @abstractmethod
    def finish(self, optimizer: Any) -> dict[str, Any]:
        """What is read once, after the last step: segments, driver, paged bytes."""

    @abstractmethod
    def __enter__(self) -> Meter: ...

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Events(Protocol):
    """Takes events, as a journal does."""

    def write(self, event: str, **values: Any) -> None:
        """Adds an event."""


class Moments:
    """Tells the meter and the journal which moment of the fine-tune begins.

    A moment lasts until the next begins. Steps after the warm-up share the label `2.`,
    and those after what a method does between steps, a milestone, the label `3.`.
    """

    def __init__(self, meter: Meter, journal: Events) -> None:
        self._meter = meter
        self._journal = journal
        self._label = ""
        self._is_past_milestone = False
        self._first_started: float | None = None
        self._started = 0.0
        self._step_started = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the first moment began."""
        first = self._first_started
        return 0.0 if first is None else time.perf_counter() - first

    def begin(self, label: str) -> None:
        """Ends the running moment and starts another."""
        self.end()
        self._label = label
        self._journal.write("begin", label=label)
        self._meter.reset()
        self._started = time.perf_counter()
        if self._first_started is None:
            self._first_started = self._started

    def hold(self, model: nn.Module) -> None:
        """Says that a model's tensors are held, as one that was loaded is."""
        self._meter.hold((*model.parameters(), *model.buffers()))

    def begin_phase(self, step: int, phase: str) -> None:
        """Starts a phase of a step, which counts from 1."""
        measured = WARM_UP_STEPS + 1
        number = measured + 1 if self._is_past_milestone else min(step, measured)
        self.begin(f"{number}.{phase}")

    def begin_milestone(self, label: str) -> None:
        """Starts what a method does between steps."""
        self.begin(label)
        self._is_past_milestone = True

    def begin_step(self) -> None:
        """Starts the clock of a step."""
        self._step_started = time.perf_counter()

    def end_step(self, step: int, loss: float) -> None:
        """Ends the running moment and the step."""
        self.end()
        seconds = round(time.perf_counter() - self._step_started, 6)
        self._journal.write("step", number=step, seconds=seconds, loss=loss)

    def end(self) -> None:
        """Ends the running moment, if one is running."""
        if not self._label:
            return
        reading = self._meter.read()
        microseconds = round((time.perf_counter() - self._started) * 1e6)
        self._journal.write(
            "moment",
            label=self._label,
            allocated_bytes=reading.allocated_bytes,
            reserved_bytes=reading.reserved_bytes,
            end_allocated_bytes=reading.end_allocated_bytes,
            counters={**reading.counters, "microseconds": microseconds},
        )
        self._label = ""
