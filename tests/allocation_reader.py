"""Memory as torch's own profiler sees it: every allocation and release on the CPU.

It stands beside the meter that memplan ships, and shares nothing with it: it sees
blocks of the allocator instead of tensors, and so what kernels take for themselves too.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, profile, record_function

from memplan.profiler.meter import Meter, Reading

BEGIN, END = "moment begins", "moment ends"
"""The marks that divide a profile into moments."""


class ProfilerMeter(Meter):
    """Marks each moment in a profile; the moments are read when it is over."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def reset(self) -> None:
        with record_function(BEGIN):
            pass

    def read(self) -> Reading:
        with record_function(END):
            pass
        return Reading(allocated_bytes=0, reserved_bytes=0, end_allocated_bytes=0)

    def hold(self, tensors: Iterable[Any]) -> None:
        """Blocks are seen without being told of."""

    def finish(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def peaks(self) -> list[tuple[int, int]]:
        """For each moment: most bytes that were live, and those live at its end."""
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        rows = sorted(
            (event.start_ns(), event.name(), event.nbytes())
            for event in events
            if event.name() in (autograd_profiler.MEMORY_EVENT_NAME, BEGIN, END)
        )
        live = peak = 0
        found = []
        for _, name, num_bytes in rows:
            if name == BEGIN:
                peak = live
            elif name == END:
                found.append((peak, live))
            else:
                live += num_bytes
                peak = max(peak, live)
        return found

    def __enter__(self) -> ProfilerMeter:
        self._profile.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._profile.__exit__(kind, error, trace)
