"""Tracks at one batch, length and rank: what to take and to give back, in order.

A program is the listing of a layer's large blocks, its linear layers written into their
holes. Blocks of up to a mebibyte come from the allocator's small pool, of which only
the most that is live counts; they are summed here and not listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memplan.allocator import SMALL_LIMIT_BYTES
from memplan.estimator.activations import last_holder
from memplan.estimator.polynomials import Sizes, rounded, value
from memplan.tape import LOSS, LayerTape
from memplan.track import INPUT, BlockTrack, Events, Foreign, LayerTrack, ModelTrack

TAKE, GIVE, GIVE_FOREIGN, STICK, CACHE, GRADIENT = range(6)
"""What an operation does: takes a block, gives it back if it is there, gives back
another layer's, leaves it to the graph or to autocast's cache, or makes a gradient."""

Operation = tuple[int, int, Any]
"""What to do, the block's number, and its bytes, or the foreign block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Operations in order, and the small blocks beside them."""

    operations: tuple[Operation, ...]
    small_net: int
    small_peak: int
    small_gradients: int = 0
    """Bytes of small gradients, which outlive the listing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A layer's forward and backward."""

    num_blocks: int
    forward: Listing
    backward: Listing
    made: Mapping[tuple[bool, int], tuple[int, ...]]
    """Numbers of large blocks by whether backward makes them, and by their bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filling:
    """What stands in a hole: a linear layer's track and tape, and its dimensions."""

    track: LayerTrack
    tape: LayerTape
    sizes: Sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBlocks:
    """The blocks of head and loss at one number of tokens."""

    sizes: tuple[int, ...]
    lasting: tuple[int, ...]
    input_gradient: int
    forward: Events
    backward: Events
    holds_input: bool


@dataclass(slots=True)
class _Lister:
    """Writes operations; small blocks are summed."""

    operations: list[Operation] = field(default_factory=list)
    small: int = 0
    small_peak: int = 0
    small_gradients: int = 0

    def listing(self) -> Listing:
        return Listing(
            operations=tuple(self.operations),
            small_net=self.small,
            small_peak=self.small_peak,
            small_gradients=self.small_gradients,
        )


class _Compiler:
    """Writes programs of one part of the step."""

    def __init__(  # noqa: PLR0913 - each is a part of a track or what fills it
        self,
        sizes: Sequence[Any],
        values: Sizes,
        lasting: Sequence[int],
        holes: Mapping[int, Filling],
        foreign: Sequence[Foreign],
        loss: LossBlocks | None = None,
    ) -> None:
        self._values = values
        self._sizes = [rounded(round(value(size, values))) for size in sizes]
        self._lasting = set(lasting)
        self._holes = holes
        self._foreign = self._foreign_of(foreign)
        self._loss = loss
        self._numbers: dict[int, dict[int, int]] = {}
        """By hole: numbers here of the blocks of the linear layer's track."""
        self._held: dict[int, list[int]] = {}
        """By hole: blocks that its backward gives back."""
        self._done: set[int] = set()
        self._made: dict[tuple[bool, int], list[int]] = {}
        self._given: set[int] = set()
        self._in_backward = False
        self._lister = _Lister()

    def use(self, foreign: Sequence[Foreign]) -> None:
        """Reads foreign blocks by another list from here on."""
        self._foreign = self._foreign_of(foreign)

    def write(
        self, events: Events, *, in_backward: bool, passing: bool = False
    ) -> Listing:
        """The operations of some events."""
        self._lister = _Lister()
        self._in_backward = in_backward
        for event in events:
            if isinstance(event, int):
                self._one(event)
            elif event[0] == "F":
                self._forward(*event[1:], passing=passing)
            elif event[0] == "B":
                self._backward(*event[1:])
            elif event[0] == "D":
                self._drop(event[1], event[2], passing=passing)
            elif event[0] == "?":
                self._give_late(event[1])
            else:
                self._give_foreign(event[1])
        return self._lister.listing()

    def adapt(self) -> Listing:
        """The operations that make the adapters of all holes."""
        self._lister = _Lister()
        for filling in self._holes.values():
            numbers = {
                number: self._add(round(value(polynomial, filling.sizes)))
                for number, polynomial in enumerate(filling.track.adapt_sizes)
            }
            self._hole_events(filling.track.adapt, numbers, ())
        return self._lister.listing()

    @property
    def num_blocks(self) -> int:
        return len(self._sizes)

    @property
    def made(self) -> dict[tuple[bool, int], tuple[int, ...]]:
        """Blocks that this part leaves to others to give back."""
        return {
            key: tuple(number for number in numbers if number not in self._given)
            for key, numbers in self._made.items()
        }

    def _foreign_of(self, foreign: Sequence[Foreign]) -> list[tuple[int, bool, int]]:
        return [
            (
                one.offset,
                one.in_backward,
                rounded(round(value(one.size, self._values))),
            )
            for one in foreign
        ]

    def _one(self, event: int) -> None:
        if event < 0:
            self._give(-1 - event)
        elif event in self._lasting:
            self._gradient(event)
        else:
            self._take(event)

    def _take(self, number: int) -> None:
        size, lister = self._sizes[number], self._lister
        if size > SMALL_LIMIT_BYTES:
            lister.operations.append((TAKE, number, size))
            self._made.setdefault((self._in_backward, size), []).append(number)
            return
        lister.small += size
        lister.small_peak = max(lister.small_peak, lister.small)

    def _give(self, number: int) -> None:
        size = self._sizes[number]
        self._given.add(number)
        if size > SMALL_LIMIT_BYTES:
            self._lister.operations.append((GIVE, number, size))
        else:
            self._lister.small -= size

    def _give_late(self, number: int) -> None:
        """Gives back a block that a layer may have given back before."""
        if self._sizes[number] > SMALL_LIMIT_BYTES:
            self._lister.operations.append((GIVE, number, self._sizes[number]))

    def _gradient(self, number: int) -> None:
        size = self._sizes[number]
        if size > SMALL_LIMIT_BYTES:
            self._lister.operations.append((GRADIENT, number, size))
        else:
            self._lister.small_gradients += size

    def _give_foreign(self, index: int) -> None:
        offset, in_backward, size = self._foreign[index]
        if size > SMALL_LIMIT_BYTES:
            self._lister.operations.append((GIVE_FOREIGN, offset, (in_backward, size)))
        else:
            self._lister.small -= size

    def _move(self, kind: int, number: int) -> None:
        if self._sizes[number] > SMALL_LIMIT_BYTES:
            self._lister.operations.append((kind, number, self._sizes[number]))

    def _drop(self, number: int, holes: Sequence[int], *, passing: bool) -> None:
        """Drops the input of holes, or leaves it to the last that holds it."""
        if self._loss is not None:
            if self._loss.holds_input:
                self._held.setdefault(LOSS, []).append(number)
            else:
                self._give(number)
            return
        recomputing = self._in_backward
        tapes = {hole: self._holes[hole].tape for hole in holes}
        if any(tape.sticks for tape in tapes.values()) and not recomputing:
            self._move(STICK, number)
            return
        last = last_holder(tapes, self._done)
        if last is not None and not passing:
            self._held.setdefault(last, []).append(number)
            return
        self._give(number)

    def _add(self, size: int) -> int:
        self._sizes.append(rounded(size))
        return len(self._sizes) - 1

    def _forward(self, hole: int, taken: int, made: int, *, passing: bool) -> None:
        if hole == LOSS:
            self._loss_forward()
            return
        filling = self._holes[hole]
        track = filling.track
        polynomials = track.passing_sizes if passing else track.sizes
        output = track.passing_output if passing else track.output
        numbers = {}
        for number, polynomial in enumerate(polynomials):
            size = round(value(polynomial, filling.sizes))
            if number == output and made >= 0:
                numbers[number] = made
                self._sizes[made] = rounded(size)
            else:
                numbers[number] = self._add(size)
        self._numbers[hole] = numbers
        events = track.passing if passing else track.forward
        self._hole_events(events, numbers, ())
        if passing:
            alive = {event for event in events if isinstance(event, int) and event >= 0}
            alive -= {-1 - e for e in events if isinstance(e, int) and e < 0}
            for number in sorted(alive - {output}):
                self._move(CACHE, numbers[number])

    def _backward(self, hole: int, taken: int, made: int) -> None:
        if hole == LOSS:
            self._loss_backward(made)
            return
        track = self._holes[hole].track
        numbers = self._numbers[hole]
        if made >= 0:
            numbers[track.input_gradient] = made
        lasting = tuple(numbers[number] for number in track.lasting)
        self._hole_events(track.backward, numbers, lasting, hole)
        self._done.add(hole)

    def _hole_events(
        self,
        events: Events,
        numbers: Mapping[int, int],
        lasting: Sequence[int],
        hole: int | None = None,
    ) -> None:
        for event in events:
            if event == INPUT:
                self._release_held(hole)
            elif event < 0:
                self._give(numbers[-1 - event])
            elif numbers[event] in lasting:
                self._gradient(numbers[event])
            else:
                self._take(numbers[event])
        self._release_held(hole)

    def _release_held(self, hole: int | None) -> None:
        if hole is not None:
            for number in self._held.pop(hole, ()):
                self._give(number)

    def _loss_forward(self) -> None:
        loss = self._loss
        assert loss is not None
        self._numbers[LOSS] = {
            number: self._add(size) for number, size in enumerate(loss.sizes)
        }
        self._hole_events(loss.forward, self._numbers[LOSS], ())

    def _loss_backward(self, made: int) -> None:
        loss = self._loss
        assert loss is not None
        numbers = self._numbers[LOSS]
        if made >= 0:
            numbers[loss.input_gradient] = made
        lasting = tuple(numbers[number] for number in loss.lasting)
        self._hole_events(loss.backward, numbers, lasting, LOSS)


def adapt_listing(holes: Sequence[Filling]) -> tuple[int, Listing]:
    """While a layer's linear layers are adapted, and how many blocks are numbered."""
    compiler = _Compiler((), Sizes({"": 1}), (), dict(enumerate(holes)), ())
    listing = compiler.adapt()
    return compiler.num_blocks, listing


def layer_program(
    track: BlockTrack,
    holes: Sequence[Filling],
    values: Sizes,
    *,
    checkpointed: bool,
) -> Program:
    """The program of one layer."""
    compiler = _Compiler(
        track.sizes, values, track.lasting, dict(enumerate(holes)), track.foreign
    )
    forward = compiler.write(track.forward, in_backward=False, passing=checkpointed)
    backward = compiler.write(track.backward, in_backward=True)
    return Program(
        num_blocks=compiler.num_blocks,
        forward=forward,
        backward=backward,
        made=compiler.made,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What is around the layers: before them, in norm, head and loss, and after."""

    num_blocks: int
    before: Listing
    tail_forward: Listing
    tail_backward: Listing
    after: Listing
    made: Mapping[tuple[bool, int], tuple[int, ...]]


def around_program(track: ModelTrack, loss: LossBlocks, values: Sizes) -> Around:
    """The program of what is around the layers."""
    compiler = _Compiler(
        track.sizes, values, track.lasting, {}, track.before_foreign, loss
    )
    turn = next(n for n, event in enumerate(track.tail) if _is_backward(event))
    before = compiler.write(track.before, in_backward=False)
    compiler.use(track.tail_foreign)
    tail_forward = compiler.write(track.tail[:turn], in_backward=False)
    tail_backward = compiler.write(track.tail[turn:], in_backward=True)
    compiler.use(track.before_foreign)
    after = compiler.write(track.after, in_backward=True)
    return Around(
        num_blocks=compiler.num_blocks,
        before=before,
        tail_forward=tail_forward,
        tail_backward=tail_backward,
        after=after,
        made=compiler.made,
    )


def _is_backward(event: Any) -> bool:
    return not isinstance(event, int) and event[0] == "B"
