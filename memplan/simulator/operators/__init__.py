"""What CUDA allocates inside an operator, where the meta kernel does not show it.

A rule is a function of a `Call`, registered under the operator's name. It says in which
order the operator's outputs and its own temporaries are allocated; temporaries that it
does not free die with the operator. Operators without a rule allocate their outputs and
nothing else: those that were looked at are in `plain.py`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from memplan.gpu import Gpu
    from memplan.simulator.trace import Tracer

RULES: dict[str, Callable[[Call], None]] = {}
"""The rules by operator, such as `aten::mm`."""

Rule = TypeVar("Rule", bound="Callable[[Call], None]")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of those operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Call:
    """One call of an operator: what it was given, and what it allocates."""

    __slots__ = ("_done", "_result", "_temporaries", "args", "func", "kwargs", "tracer")

    def __init__(
        self, tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.tracer = tracer
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self._temporaries: list[int] = []
        self._done = False
        self._result: Any = None

    @property
    def gpu(self) -> Gpu:
        """The card that the operator would run on."""
        return self.tracer.gpu

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument, whether it was given by place or by name."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def run(self) -> Any:
        """Runs the operator and logs what it returns."""
        result = self.tracer.kernels.run(self.func, self.args, self.kwargs)
        self.tracer.record(self.func, self.args, result)
        return result

    def outputs(self) -> Any:
        """Allocates the outputs, once."""
        if not self._done:
            self._done = True
            self._result = self.run()
        return self._result

    def give(self, result: Any, order: tuple[int, ...] | None = None) -> None:
        """Makes `result` the operator's outputs, allocated in that order if given.

        For operators whose meta kernel does not run, or returns what CUDA keeps on the
        host.
        """
        self._done = True
        self._result = result
        ordered = result if order is None else tuple(result[i] for i in order)
        self.tracer.record(self.func, self.args, ordered)

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Says that those outputs take no memory of the card."""
        for tensor in tensors:
            self.tracer.ignore(tensor)

    def temporary(self, num_bytes: int) -> int:
        """Allocates a block of the kernel's own."""
        num_bytes = num_bytes if self.tracer.scratch else 0
        block = self.tracer.allocate(num_bytes, self.func, "workspace")
        self._temporaries.append(block)
        return block

    def free(self, block: int) -> None:
        """Releases a temporary before the operator ends."""
        self._temporaries.remove(block)
        self.tracer.log.free(block)

    def workspace(self, num_bytes: int, library: str = "cublas") -> None:
        """Allocates this thread's workspace, kept for life, if it is missing."""
        if self.tracer.scratch and self.tracer.needs_workspace(library):
            self.tracer.allocate(num_bytes, self.func, "workspace")

    def finish(self) -> Any:
        """Releases what the operator still holds; its result."""
        self.outputs()
        for block in self._temporaries:
            self.tracer.log.free(block)
        return self._result


def rule_of(func: Any) -> Callable[[Call], None] | None:
    """The rule of an operator, None where it allocates its outputs alone."""
    _load()
    name = func.name()
    return RULES.get(name) or RULES.get(name.partition(".")[0])


def tensor_bytes(tensor: torch.Tensor, itemsize: int | None = None) -> int:
    """Bytes of a dense tensor of that shape, in its own or a given element size."""
    return tensor.numel() * (itemsize or tensor.element_size())


@functools.cache
def _load() -> None:
    for name in _rule_files():
        importlib.import_module(name)


def _rule_files() -> Iterator[str]:
    for module in pkgutil.iter_modules(__path__):
        yield f"{__name__}.{module.name}"
