"""The bytes of tensors on a CPU: which storages exist, from operator to operator.

A storage counts from when it is first seen, as an operator's argument or result, until
its last owner lets it go. What a kernel takes for itself while it runs is not seen, and
there is no cache: what is reserved is what is allocated.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memplan.profiler.meter import Meter, Reading
from memplan.training.wrapped import any_wraps, plain_tensors
from memplan.units import KIB


class StorageTracker(TorchDispatchMode):
    """Counts the live bytes of every storage of a device that operators touch."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self._peak_bytes = 0
        self._device_type = device_type
        self._live: dict[int, weakref.ref[Any]] = {}

    @property
    def peak_bytes(self) -> int:
        """The most that was live since the reset."""
        self._note_peak()
        return self._peak_bytes

    def reset(self) -> None:
        """Forgets the peak so far."""
        self._peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if types and any_wraps(types):
            return NotImplemented  # the tensor's own operators come here in turn
        self.see((args, kwargs))
        self._note_peak()
        result = func(*args, **kwargs or {})
        self.see(result)
        # Autograd's engine adds gradients in place, but not while operators are looked
        # at: then the first addend dies right after (torch/csrc/autograd/
        # input_buffer.cpp, `accumulate`). So what is live is asked a little later, but
        # for a view, whose base holds the storage too, so that nothing is in place.
        if (
            func is not torch.ops.aten.add.Tensor
            or args[0]._is_view()
            or not _is_run_by_engine()
        ):
            self._note_peak()
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from wrapping the handler: the caller's frame must be next."""
        return False

    def _note_peak(self) -> None:
        self._peak_bytes = max(self._peak_bytes, self.live_bytes)

    def see(self, values: Any) -> None:
        """Takes the storages of tensors, in lists, tuples and dicts."""
        for value in tree_leaves(values):
            if not isinstance(value, torch.Tensor):
                continue
            if value.device.type == self._device_type:
                for tensor in plain_tensors(value):
                    self._take(tensor.untyped_storage())

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._live or not num_bytes:
            return

        def died(reference: Any) -> None:
            del self._live[key]
            self.live_bytes -= num_bytes

        self._live[key] = weakref.ref(storage, died)
        self.live_bytes += num_bytes


class CpuMeter(Meter):
    """Reads the bytes of tensors, and beside them what the process holds resident."""

    def __init__(self) -> None:
        self._tracker = StorageTracker("cpu")

    def reset(self) -> None:
        self._tracker.reset()

    def read(self) -> Reading:
        tracker = self._tracker
        return Reading(
            allocated_bytes=tracker.peak_bytes,
            reserved_bytes=tracker.peak_bytes,
            end_allocated_bytes=tracker.live_bytes,
            counters={
                "resident_bytes": _resident_peak_bytes(),
                "resident_end_bytes": _resident_bytes(),
            },
        )

    def hold(self, tensors: Iterable[Any]) -> None:
        self._tracker.see(list(tensors))

    def finish(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def __enter__(self) -> CpuMeter:
        self._tracker.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tracker.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]


def _is_run_by_engine() -> bool:
    """Whether the operator that is looked at is the engine's own, and no node's."""
    if torch._C._current_autograd_node() is None:
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code is _engine_run_backward.__code__


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _resident_peak_bytes() -> int:
    """The most that the process ever held; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak * (1 if sys.platform == "darwin" else KIB))
