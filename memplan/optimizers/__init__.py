"""Optimizers, one file each: the state kept for a parameter, and how it is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from memplan import registry

if TYPE_CHECKING:
    import torch
    from torch import nn


class Optimizer(ABC):
    """An optimizer: the state it keeps for a parameter, and how it is built."""

    summary: ClassVar[str]
    """One line for lists of optimizers."""

    @abstractmethod
    def state_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        """Bytes of each tensor that torch's allocator holds for a parameter.

        `dtype_bytes` is what one element of the parameter takes. State in managed
        memory, which lies outside of torch's numbers, is in `paged_bytes`.
        """

    def paged_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a parameter's state in CUDA's managed memory."""
        return 0

    def loaded_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> tuple[int, ...]:
        """Bytes of each tensor of a parameter's state that came from a checkpoint."""
        return self.state_bytes(shape, dtype_bytes)

    def step_blocks(self, sizes: Sequence[int], dtype_bytes: int) -> Sequence[int]:
        """Bytes of each block a step makes and drops again, where most are live.

        `sizes` are the bytes of the parameters. None where one kernel does it all.
        """
        return ()

    @abstractmethod
    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over those parameters, as a training loop builds it.

        Over meta parameters it does what the CUDA one would: where the real code does
        not run on the meta device, it allocates the same state and temporaries.
        """

    def build_for(
        self, model: nn.Module, parameters: list[torch.nn.Parameter]
    ) -> torch.optim.Optimizer:
        """The optimizer over parameters of a model that it may have to know."""
        return self.build(parameters)


def find(name: str) -> Optimizer:
    """The optimizer of that name; raises UnknownNameError."""
    optimizer: Optimizer = registry.load("optimizers", name, "optimizer")
    return optimizer
