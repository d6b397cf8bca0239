"""Holes: modules in the place of linear layers, which only make their output.

A hole marks in the log where its forward and its backward ran, and which blocks went in
and came out, so that what a linear layer does can be put there later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memplan.simulator.events import FREE
from memplan.simulator.trace import Tracer
from memplan.tape import LOSS


@dataclass(frozen=True, slots=True)
class HoleMark:
    """The beginning or end of a hole's forward or backward."""

    kind: str
    """`F` and `f` begin and end the forward, `B` and `b` the backward."""
    hole: int
    block: int
    """What came in where it begins, what came out where it ends."""


Event = tuple[int, int] | HoleMark
"""A block and its bytes, or FREE; or a hole's mark."""


def let_go_of(events: Iterable[Event]) -> dict[int, int]:
    """By hole: the gradient that goes after its backward, as nothing else holds it.

    Where a layer is in the hole, it goes as soon as that is done with it.
    """
    let_go: dict[int, int] = {}
    begun: HoleMark | None = None
    ended: HoleMark | None = None
    for event in events:
        if isinstance(event, HoleMark):
            begun = event if event.kind == "B" else begun
            ends = event.kind == "b" and event.hole != LOSS
            ended = begun if ends else None
        elif event[1] != FREE:
            ended = None
        elif ended is not None and event[0] == ended.block:
            let_go[ended.hole] = event[0]
    return let_go


class TapeTracer(Tracer):
    """A tracer whose log holds the marks of holes among its events."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marks: list[tuple[int, HoleMark]] = []
        """Marks, each with the number of events that came before it."""
        self.token = torch.empty((), device="meta", requires_grad=True)
        """What makes the outputs of holes need a gradient, as adapters do."""
        self.input_dtypes: dict[int, str] = {}
        """By hole: the precision of its input."""
        self.output_dtype = ""
        """The precision of a single layer's output."""

    def mark(self, kind: str, hole: int, tensor: torch.Tensor | None) -> None:
        block = -1 if tensor is None else self.block_of(tensor)
        self.marks.append((len(self.log.events), HoleMark(kind, hole, block)))

    def block_of(self, tensor: torch.Tensor) -> int:
        """The block that a tensor lies in; negative where it is none of the card's."""
        storage = self._live.get(tensor.untyped_storage()._cdata)
        return -1 if storage is None else storage.block


class Hole(nn.Module):
    """A linear layer of which only input and output are there."""

    def __init__(
        self,
        tracer: TapeTracer,
        number: int,
        out_features: int,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.tracer = tracer
        self.number = number
        self.out_features = out_features
        self.dtype = dtype
        """The output's precision; the input's where it is None."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Hole.apply(x, self.tracer.token, self)  # type: ignore[no-untyped-call]
        return y


class _Hole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token: torch.Tensor, hole: Hole) -> Any:
        ctx.hole, ctx.shape, ctx.dtype = hole, x.shape, x.dtype
        hole.tracer.mark("F", hole.number, x)
        hole.tracer.input_dtypes[hole.number] = str(x.dtype).removeprefix("torch.")
        shape = (*x.shape[:-1], hole.out_features)
        y = x.new_empty(shape, dtype=hole.dtype or x.dtype)
        hole.tracer.mark("f", hole.number, y)
        # Something is kept, as adapters keep: a checkpoint computes it again before
        # this backward, and no further than needed.
        ctx.save_for_backward(token)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hole, _ = ctx.hole, ctx.saved_tensors
        hole.tracer.mark("B", hole.number, grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_empty(ctx.shape, dtype=ctx.dtype)
        hole.tracer.mark("b", hole.number, grad_x)
        return grad_x, None, None
