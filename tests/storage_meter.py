"""Which storages operators make on a device, how large they are and how long they live.

It sees what a program of operators holds, on any device, and nothing of what a kernel
takes for itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """Counts the storages that are made under it, and the bytes live at once.

    Bytes are counted from 0: what lived before is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.births: list[int] = []
        """Bytes of each storage that was made, in order."""
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def start(self) -> None:
        """Forgets the births and the peak so far."""
        self.births = []
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in tensors(args):
            self._know(tensor.untyped_storage())
        result = func(*args, **kwargs or {})
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen and storage.nbytes():
                self._take(storage)
        return result

    def _know(self, storage: torch.UntypedStorage) -> None:
        """Remembers a storage that was made elsewhere."""
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._seen.pop(key))

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.births.append(size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

        def forget(_: Any) -> None:
            self._seen.pop(key)
            self.live_bytes -= size

        self._seen[key] = weakref.ref(storage, forget)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in lists, tuples and dicts."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
