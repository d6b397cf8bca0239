"""What a layer keeps for backward, and the most it holds while it runs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memplan.estimator.polynomials import Sizes, larger, value
from memplan.tape import BlockTape, LayerTape, Mark, Stretch, Tape


@dataclass(frozen=True, kw_only=True, slots=True)
class Hole:
    """What stands in a hole: a linear layer's tape, its sizes, its gradient's bytes."""

    tape: LayerTape
    sizes: Sizes
    gradient_bytes: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBytes:
    """A layer's bytes, above what was live when it began."""

    kept: Any
    """From its forward to its backward."""
    forward_peak: Any
    backward_peak: Any
    """Above what was live before its forward."""
    stuck: Any
    """Of what is kept, what backward does not release."""
    cached: Any
    """Of what is kept, what is released when the forward ends."""


class Walk:
    """Live bytes along a tape, and their maximum."""

    def __init__(
        self,
        sizes: Sizes,
        holes: tuple[Hole, ...],
        live: Any = 0,
        *,
        accumulates: bool,
    ) -> None:
        self._sizes = sizes
        self._holes = holes
        self._accumulates = accumulates
        self._recomputing = False
        self._held: dict[int, Any] = {}
        """By hole: the bytes of the input that is kept until its backward."""
        self._done: set[int] = set()
        """Holes whose backward ran."""
        self.live = live
        self.peak = live
        self.cached: Any = 0
        """Copies of weights that live as long as the forward's autocast."""
        self.stuck: Any = 0
        """Bytes that stay live until the graph is dropped."""
        self._ahead: Any = 0
        """Bytes of a hole's backward that came before a checkpoint ran again."""

    def run(self, tape: Tape, *, passing: bool = False) -> None:
        """Walks a tape; `passing` is a checkpoint's first forward."""
        asking = asks_for_it(map(_step, tape))
        if asking is not None:
            hole = self._holes[asking]
            self._ahead = value(hole.tape.ahead, hole.sizes)
            self.live = self.live + self._ahead
        for item in tape:
            if isinstance(item, Stretch):
                self.stretch(item, self._sizes)
            elif item.kind == "drop":
                self._drop(item, passing=passing)
            elif item.kind == "F":
                hole = self._holes[item.holes[0]]
                made = hole.tape.passing if passing else hole.tape.forward
                if item.holes == (asking,):
                    made = hole.tape.again
                self.stretch(made, hole.sizes)
                if passing:
                    self.cached = self.cached + value(hole.tape.cached, hole.sizes)
                if not self._recomputing:
                    self.stuck = self.stuck + value(hole.tape.stuck, hole.sizes)
            else:
                self._back(item)

    def stretch(self, stretch: Stretch, sizes: Sizes) -> None:
        net, peak = sizes.of(stretch)
        self.peak = larger(self.peak, self.live + peak)
        self.live = self.live + net

    def start_again(self, *, recomputing: bool) -> Any:
        """The peak so far; from here on that of the backward is looked for."""
        peak, self.peak = self.peak, self.live
        self._recomputing = recomputing
        return peak

    def _drop(self, mark: Mark, *, passing: bool) -> None:
        """Drops the input of holes, or leaves that to the last that holds it."""
        size = value(mark.size, self._sizes)
        tapes = {hole: self._holes[hole].tape for hole in mark.holes}
        if any(tape.sticks for tape in tapes.values()) and not self._recomputing:
            self.stuck = self.stuck + size
            return
        last = last_holder(tapes, self._done)
        if last is not None and not passing:
            self._held[last] = self._held.get(last, 0) + size
            return
        self.live = self.live - size

    def _back(self, mark: Mark) -> None:
        """A hole's backward, which may release what it is given and what it holds."""
        (number,) = mark.holes
        hole = self._holes[number]
        self.live, self._ahead = self.live - self._ahead, 0
        owned = {
            "x": self._held.pop(number, 0),
            "y": value(mark.size, self._sizes),
        }
        for item in hole.tape.backward:
            if isinstance(item, Stretch):
                self.stretch(item, hole.sizes)
            else:
                self.live = self.live - owned.pop(item.kind)
        self.live = self.live - sum(owned.values())
        gradient = hole.gradient_bytes
        self.peak = larger(self.peak, self.live + gradient)
        if not self._accumulates:
            self.live = self.live + gradient
        self._done.add(number)


MADE = "made"
"""A step that makes blocks, in the place of a mark's kind."""


def asks_for_it(steps: Iterable[tuple[str, int]]) -> int | None:
    """The hole whose backward asks a checkpoint to compute again what forward kept.

    Steps are kinds of marks with their first holes, or MADE. None where something else
    asks, behind the last hole: then a block is made between that hole's forward and its
    backward.
    """
    last: int | None = None
    for kind, hole in steps:
        if kind == MADE:
            last = None
        elif kind == "F":
            last = hole
        elif kind == "B":
            return last if hole == last else None
    return None


def _step(item: Stretch | Mark) -> tuple[str, int]:
    if isinstance(item, Mark):
        return item.kind, item.holes[0]
    return MADE if item.peaks else "", -1


def last_holder(tapes: Mapping[int, LayerTape], done: Container[int]) -> int | None:
    """Of holes that are given one input, the one whose backward drops it.

    Backward runs from the last hole to the first; those that are `done` hold nothing.
    """
    holding = (n for n, tape in tapes.items() if tape.holds_input and n not in done)
    return min(holding, default=None)


def layer_bytes(  # noqa: PLR0913 - each says how the layer runs
    tape: BlockTape,
    holes: tuple[Hole, ...],
    sizes: Sizes,
    *,
    checkpointed: bool,
    offloaded: bool,
    accumulates: bool,
) -> LayerBytes:
    """Bytes of one layer; what is offloaded comes back for its own backward."""
    walk = Walk(sizes, holes, accumulates=accumulates)
    walk.run(tape.forward, passing=checkpointed)
    kept, stuck = walk.live, walk.stuck
    forward_peak = walk.start_again(recomputing=checkpointed)
    walk.live = walk.live - walk.cached
    walk.peak = walk.live
    walk.run(tape.backward)
    if offloaded:
        kept = kept - sum(value(block, sizes) for block in tape.kept)
    return LayerBytes(
        kept=kept,
        forward_peak=forward_peak,
        backward_peak=walk.peak,
        stuck=stuck,
        cached=walk.cached,
    )


def first_layer_bytes(  # noqa: PLR0913 - each says how the layer runs
    tape: BlockTape,
    passing: BlockTape,
    holes: tuple[Hole, ...],
    sizes: Sizes,
    adapted: Container[int],
    *,
    accumulates: bool,
) -> LayerBytes:
    """Bytes of a first layer whose input needs no gradient.

    Up to its first adapted hole it keeps nothing, as in a checkpoint's first forward,
    which `passing` is the tape of. Its backward ends there, below other layers' peaks.
    """
    walk = Walk(sizes, holes, accumulates=accumulates)
    walk.run(passing.forward[: first_reached(passing.forward, adapted)], passing=True)
    walk.run(tape.forward[first_reached(tape.forward, adapted) :])
    return LayerBytes(
        kept=walk.live,
        forward_peak=walk.peak,
        backward_peak=walk.live,
        stuck=walk.stuck,
        cached=walk.cached,
    )


def first_reached(tape: Tape, adapted: Container[int]) -> int:
    """Where the first adapted hole of a forward is."""
    return next(
        at
        for at, item in enumerate(tape)
        if isinstance(item, Mark) and item.kind == "F" and item.holes[0] in adapted
    )
