"""A dispatch mode that logs every storage's birth and death on the meta device.

A storage is born when it is first seen in an operator's output, and dies when its
Python object is collected, which torch keeps alive as long as the storage itself.
"""

from __future__ import annotations

import bisect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.gpu import Gpu
from memplan.simulator.events import EventLog
from memplan.simulator.meta import MetaKernels
from memplan.simulator.operators import Call, rule_of
from memplan.training.wrapped import any_wraps, plain_tensors

_ENGINE_CODE = _engine_run_backward.__code__
"""The frame that calls an operator which autograd's engine itself runs."""


PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a model's own paths."""

_NO_BLOCK = -1
"""The block of storages that are not on the card."""


class _Storage:
    """A live storage: the block that holds it, and the reference that reports death."""

    __slots__ = ("block", "reference")

    def __init__(self, block: int) -> None:
        self.block = block
        self.reference: Any = None


class Tracer(TorchDispatchMode):
    """Logs the allocations that the operators run under it would make on a card."""

    def __init__(
        self, gpu: Gpu, log: EventLog, *, padded: bool, scratch: bool = True
    ) -> None:
        """`scratch` says whether what kernels take for themselves is logged."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.scratch = scratch
        self.gpu = gpu
        self.log = log
        self.kernels = MetaKernels()
        self.vocab_size = 0
        """Tensors whose last side is this long are logits."""
        self.sums_in_place = False
        """Whether code runs that adds in place, but not over meta tensors."""
        self.operators: dict[Any, int] = {}
        """How often each operator ran."""
        self._padded = padded
        self._denied: set[int] = set()
        """Storages of truth values that are false when the host asks."""
        self._live: dict[int, _Storage] = {}
        self._rules: dict[Any, Callable[[Call], None] | None] = {}
        self._sources: dict[int, int] = {}
        """By block without a module: the block that it was made from."""
        self._workspaces: set[tuple[str, bool]] = set()
        self._sum: tuple[int, _Storage, int] | None = None
        self._modules = _ModuleTracker()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from wrapping the handler: the caller's frame must be next."""
        return False

    def __enter__(self) -> Tracer:
        self._modules.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._modules.stop()

    def stop(self) -> None:
        """Ends the log: what dies from now on is not a part of it."""
        for storage in self._live.values():
            storage.block = _NO_BLOCK

    def name_modules(self, model: nn.Module) -> None:
        """Takes the paths by which modules are reported."""
        self._modules.name(model)

    def hold(self, tensor: torch.Tensor, block: int) -> None:
        """Says that a tensor lives in a block that was allocated by hand."""
        self._watch(tensor.untyped_storage(), block)

    def ignore(self, tensor: torch.Tensor) -> None:
        """Says that a tensor takes no memory of the card."""
        for plain in plain_tensors(tensor):
            self._watch(plain.untyped_storage(), _NO_BLOCK)

    def deny(self, tensor: torch.Tensor) -> None:
        """Says that a truth value is false."""
        self._denied.add(tensor.untyped_storage()._cdata)

    def label(self, tensor: torch.Tensor, category: str) -> None:
        """Says what a tensor is for."""
        storage = self._live.get(tensor.untyped_storage()._cdata)
        if storage is not None and storage.block != _NO_BLOCK:
            self.log.categories[storage.block] = category

    def within(self, path: str) -> AbstractContextManager[None]:
        """Says which module that runs without being called belongs to what follows."""
        return self._modules.within(path)

    def assign(self, tensor: torch.Tensor, path: str) -> None:
        """Says which module a tensor belongs to."""
        storage = self._live.get(tensor.untyped_storage()._cdata)
        if storage is not None and storage.block != _NO_BLOCK:
            self.log.modules[storage.block] = path

    def name_parameters(self, model: nn.Module) -> None:
        """Says which module parameters belong to, and what they were cast from."""
        for name, parameter in model.named_parameters():
            storage = self._live.get(parameter.untyped_storage()._cdata)
            path = name.rpartition(".")[0].removeprefix(PEFT_PREFIX)
            block = storage.block if storage is not None else None
            while block is not None and block != _NO_BLOCK:
                self.log.modules[block] = path
                block = self._sources.pop(block, None)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._sum = None
        if types and any_wraps(types):
            return NotImplemented  # the tensor's own operators come here in turn
        self.operators[func] = self.operators.get(func, 0) + 1
        asked = func is torch.ops.aten._local_scalar_dense.default
        if asked and args[0].device.type == "meta":
            return self._answer(args[0])
        try:
            rule = self._rules[func]
        except KeyError:
            rule = self._rules[func] = rule_of(func)
        call = Call(self, func, args, kwargs or {})
        if rule is None:
            return call.run()
        rule(call)
        return call.finish()

    def record(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Logs the storages that are first seen in an operator's result."""
        for index, tensor in enumerate(_tensors(result)):
            if tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._live:
                continue
            block = self._allocate(storage.nbytes(), func, tensor)
            self._watch(storage, block)
            if not self.log.modules[block]:
                self._inherit_module(block, args, result, index)
            if func is torch.ops.aten.add.Tensor and (
                self.sums_in_place or self._is_engines()
            ):
                self._expect_sum(storage, args)

    def allocate(self, num_bytes: int, func: Any, category: str) -> int:
        """A block that belongs to no tensor: a kernel's own."""
        return self.log.allocate(num_bytes, str(func), self._modules.path(), category)

    def needs_workspace(self, library: str) -> bool:
        """Whether this thread's handle has no workspace yet; then it gets one.

        Backward runs on a thread of its own, whose handle has a workspace of its own.
        """
        key = (library, torch._C._current_autograd_node() is not None)
        missing = key not in self._workspaces
        self._workspaces.add(key)
        return missing

    def _allocate(self, num_bytes: int, func: Any, tensor: torch.Tensor) -> int:
        is_logits = (
            tensor.dim() > 1
            and tensor.shape[-1] == self.vocab_size
            # A copy of the head's transposed weight is as wide, but lies in columns.
            and tensor.stride(-1) == 1
        )
        return self.log.allocate(
            num_bytes, str(func), self._modules.path(), "logits" if is_logits else ""
        )

    def _inherit_module(
        self, block: int, args: tuple[Any, ...], result: Any, index: int
    ) -> None:
        """Outside of modules, a tensor belongs to that of what it is made from."""
        source = args[0] if args else None
        if isinstance(source, list | tuple):
            each = isinstance(result, list | tuple) and len(result) == len(source)
            source = source[index] if each else None
        if not isinstance(source, torch.Tensor):
            return
        held = self._live.get(source.untyped_storage()._cdata)
        if held is None or held.block == _NO_BLOCK:
            return
        self.log.modules[block] = self.log.modules[held.block]
        if not self.log.modules[block]:
            self._sources[block] = held.block

    def _watch(self, storage: torch.UntypedStorage, block: int) -> None:
        key = storage._cdata
        held = self._live[key] = _Storage(block)
        held.reference = weakref.ref(storage, lambda _: self._died(key))

    def _died(self, key: int) -> None:
        self._denied.discard(key)
        storage = self._live.pop(key, None)
        if storage is None or storage.block == _NO_BLOCK:
            return
        if self._sum is not None:
            position, result, addend = self._sum
            self._sum = None
            if addend == storage.block and position == len(self.log.events):
                # CUDA adds in place what nobody else holds: see `_expect_sum`.
                self.log.events.pop()
                result.block = storage.block
                return
        self.log.free(storage.block)

    def _expect_sum(self, storage: torch.UntypedStorage, args: tuple[Any, ...]) -> None:
        """Notes a sum of gradients, which on CUDA reuses its first addend's storage.

        `InputBuffer::accumulate` (torch/csrc/autograd/input_buffer.cpp) adds in place
        where the first addend is dense and nobody else holds it; over meta tensors it
        never does. That nobody holds it shows in its dying right after the sum.
        """
        addend = args[0]
        if not isinstance(addend, torch.Tensor) or addend._is_view():
            return
        held = self._live.get(addend.untyped_storage()._cdata)
        dense = addend.untyped_storage().nbytes() == storage.nbytes()
        if held is not None and dense:
            result = self._live[storage._cdata]
            self._sum = (len(self.log.events), result, held.block)

    def _is_engines(self) -> bool:
        """Whether autograd's engine runs the operator, and no Python code of a node."""
        if torch._C._current_autograd_node() is None:
            return False
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename in _OWN_FILES:
            frame = frame.f_back  # type: ignore[assignment]
        return frame is not None and frame.f_code is _ENGINE_CODE

    def _answer(self, tensor: torch.Tensor) -> bool | int | float:
        """What the host reads from the card where a program asks.

        Questions of bool are whether an attention mask hides nothing and whether
        positions belong to one sequence (transformers.masking_utils): yes unless the
        batch is padded.
        """
        if tensor.dtype == torch.bool:
            denied = tensor.untyped_storage()._cdata in self._denied
            return not (denied or self._padded)
        return 1.0 if tensor.dtype.is_floating_point else 1


class _ModuleTracker:
    """Which module an operator belongs to, in forward and in backward.

    Forward: the innermost module that is running. Backward: the module in whose forward
    the running node was made, found by autograd's sequence numbers.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._stack: list[str] = [""]
        self._numbers: list[int] = []
        self._paths: list[str] = []
        self._handles: list[Any] = []

    def name(self, model: nn.Module) -> None:
        self._names = {
            id(module): path.removeprefix(PEFT_PREFIX)
            for path, module in model.named_modules()
        }

    def start(self) -> None:
        self._handles = [
            nn_module.register_module_forward_pre_hook(self._enter),
            nn_module.register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def within(self, path: str) -> Iterator[None]:
        self._stack.append(path)
        try:
            yield
        finally:
            self._stack.pop()

    def path(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None or len(self._stack) > 1:
            return self._stack[-1]
        index = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._paths[index] if index >= 0 else ""

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._stack.append(self._names.get(id(module), self._stack[-1]))
        self._note()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()
        self._note()

    def _note(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self._numbers and self._numbers[-1] == number:
            self._paths[-1] = self._stack[-1]
            return
        self._numbers.append(number)
        self._paths.append(self._stack[-1])


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)


_OWN_FILES = frozenset({__file__, Call.run.__code__.co_filename})
