"""Tracks at one batch, length and rank: what to take and to give back, in order.

A program is the listing of a layer's large blocks, its linear layers written into their
holes. Blocks of up to a mebibyte come from the allocator's small pool, of which only
the most that is live counts; they are summed here and not listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memplan.allocator import SMALL_LIMIT_BYTES
from memplan.estimator.activations import MADE, asks_for_it, last_holder
from memplan.estimator.polynomials import Sizes, rounded, value
from memplan.tape import LOSS, LayerTape
from memplan.track import (
    INPUT,
    OUTPUT_GRADIENT,
    BlockTrack,
    Events,
    Foreign,
    LayerTrack,
    ModelTrack,
)

TAKE, GIVE, GIVE_FOREIGN, STICK, CACHE, GRADIENT, WORKSPACE = range(7)
"""What an operation does: takes a block, gives it back if it is there, gives back
another layer's, leaves it to the graph or to autocast's cache, makes a gradient, or
needs cuBLAS, whose workspace the thread may not have yet."""

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
    small_cached: int = 0
    """Bytes of small blocks that are left to autocast's cache."""
    small_stuck: int = 0
    """Bytes of small blocks that are left to the graph."""


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
    small_cached: int = 0
    small_stuck: int = 0

    def listing(self) -> Listing:
        return Listing(
            operations=tuple(self.operations),
            small_net=self.small,
            small_peak=self.small_peak,
            small_gradients=self.small_gradients,
            small_cached=self.small_cached,
            small_stuck=self.small_stuck,
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
        loss_gradient: int = -1,
    ) -> None:
        self._values = values
        self._sizes = [rounded(round(value(size, values))) for size in sizes]
        self._lasting = set(lasting)
        self._holes = holes
        self._foreign = self._foreign_of(foreign)
        self._loss = loss
        self._loss_gradient = loss_gradient
        """The number of the hidden states' gradient, which a loss may make ahead."""
        self._numbers: dict[int, dict[int, int]] = {}
        """By hole: numbers here of the blocks of the linear layer's track."""
        self._held: dict[int, list[int]] = {}
        """By hole: blocks that its backward gives back."""
        self._gradients_of_outputs: dict[int, int] = {}
        """By hole: what its backward was given, where nothing else holds it."""
        self._done: set[int] = set()
        self._ahead: dict[int, dict[int, int]] = {}
        """By hole: numbers of the blocks of a backward that has begun already."""
        self._made: dict[tuple[bool, int], list[int]] = {}
        self._given: set[int] = set()
        self._in_backward = False
        self._lister = _Lister()

    def use(self, foreign: Sequence[Foreign]) -> None:
        """Reads foreign blocks by another list from here on."""
        self._foreign = self._foreign_of(foreign)

    def write(
        self,
        events: Events,
        *,
        in_backward: bool,
        num_passing: int = 0,
    ) -> Listing:
        """The operations of some events; a first few may keep nothing for backward."""
        self._lister = _Lister()
        self._in_backward = in_backward
        asking = asks_for_it(map(_step, events))
        if asking is not None:
            self._begin_backward(asking)
        for place, event in enumerate(events):
            passes = place < num_passing
            if isinstance(event, int):
                self._one(event)
            elif event[0] == "F":
                self._forward(*event[1:], passing=passes)
            elif event[0] == "B":
                self._backward(*event[1:])
            elif event[0] == "D":
                self._drop(event[1], event[2], passing=passes)
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
        """Leaves a block to the graph or to autocast's cache."""
        size, lister = self._sizes[number], self._lister
        if size > SMALL_LIMIT_BYTES:
            lister.operations.append((kind, number, size))
        elif kind == CACHE:
            lister.small_cached += size
        else:
            lister.small_stuck += size

    def _drop(self, number: int, holes: Sequence[int], *, passing: bool) -> None:
        """Drops the input of holes, or leaves it to the last that holds it."""
        if self._loss is not None:
            if self._loss.holds_input:
                self._held.setdefault(LOSS, []).append(number)
            elif number not in self._given:
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
            self._loss_forward(taken)
            return
        filling = self._holes[hole]
        track = filling.track
        polynomials = track.passing_sizes if passing else track.sizes
        output = track.passing_output if passing else track.output
        numbers = self._ahead.get(hole) or self._numbered(polynomials, filling)
        if made >= 0:
            self._sizes[made] = self._sizes[numbers[output]]
            numbers[output] = made
        self._numbers[hole] = numbers
        events = track.passing if passing else track.forward
        self._hole_events(events, numbers, ())
        if passing:
            alive = {event for event in events if isinstance(event, int) and event >= 0}
            alive -= {-1 - e for e in events if isinstance(e, int) and e < 0}
            for number in sorted(alive - {output}):
                is_weight = all("N" not in word for word in polynomials[number])
                self._move(CACHE if is_weight else STICK, numbers[number])

    def _numbered(self, polynomials: Sequence[Any], filling: Filling) -> dict[int, int]:
        """Numbers here of the blocks of a linear layer's track."""
        return {
            number: self._add(round(value(polynomial, filling.sizes)))
            for number, polynomial in enumerate(polynomials)
        }

    def _begin_backward(self, hole: int) -> None:
        """What a hole's backward makes before a checkpoint computes the layer again."""
        filling = self._holes[hole]
        self._ahead[hole] = self._numbered(filling.track.sizes, filling)
        begun = filling.track.backward[: filling.track.ahead]
        self._hole_events(begun, self._ahead[hole], ())

    def _backward(self, hole: int, taken: int, made: int, own: int = 0) -> None:
        """A hole's backward, which may be the only one to hold what it takes."""
        if own:
            self._gradients_of_outputs[hole] = taken
        if hole == LOSS:
            self._loss_backward()
            return
        track = self._holes[hole].track
        numbers = self._numbers[hole]
        if made >= 0:
            numbers[track.input_gradient] = made
        lasting = tuple(numbers[number] for number in track.lasting)
        begun = track.ahead if hole in self._ahead else 0
        self._hole_events(track.backward[begun:], numbers, lasting, hole)
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
            elif event == OUTPUT_GRADIENT:
                self._release_gradient(hole)
            elif event < 0:
                self._give(numbers[-1 - event])
            elif not self._sizes[numbers[event]]:
                self._lister.operations.append((WORKSPACE, numbers[event], 0))
            elif numbers[event] in lasting:
                self._gradient(numbers[event])
            else:
                self._take(numbers[event])
        self._release_held(hole)
        self._release_gradient(hole)

    def _release_held(self, hole: int | None) -> None:
        if hole is not None:
            for number in self._held.pop(hole, ()):
                self._give(number)

    def _release_gradient(self, hole: int | None) -> None:
        if hole in self._gradients_of_outputs:
            self._give(self._gradients_of_outputs.pop(hole))

    def _loss_forward(self, taken: int) -> None:
        """Head and loss, which may let go of the hidden states on the way."""
        loss = self._loss
        assert loss is not None
        if not loss.holds_input:
            self._held[LOSS] = [taken]
        self._numbers[LOSS] = {
            number: self._add(size) for number, size in enumerate(loss.sizes)
        }
        if self._loss_gradient >= 0:
            self._numbers[LOSS][loss.input_gradient] = self._loss_gradient
        lasting = tuple(self._numbers[LOSS][number] for number in loss.lasting)
        self._hole_events(loss.forward, self._numbers[LOSS], lasting, LOSS)

    def _loss_backward(self) -> None:
        loss = self._loss
        assert loss is not None
        numbers = self._numbers[LOSS]
        lasting = tuple(numbers[number] for number in loss.lasting)
        self._hole_events(loss.backward, numbers, lasting, LOSS)


def _step(event: Any) -> tuple[str, int]:
    if isinstance(event, int):
        return MADE if event >= 0 else "", event
    return event[0], event[1]


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
    offloaded: bool,
) -> Program:
    """The program of one layer."""
    track = _with_offloading(track) if offloaded else track
    num_passing = len(track.forward) if checkpointed else 0
    return _program(track, holes, values, track.forward, track.backward, num_passing)


def _with_offloading(track: BlockTrack) -> BlockTrack:
    """The track of a checkpointed layer whose input waits on the host.

    The input goes when the layer's forward has ended, since the checkpoint keeps a copy
    on the host (torch.autograd.graph.save_on_cpu). Backward takes a block for what
    comes back, on the stream of all others, and drops it where it would the input.
    """
    inputs = [
        index
        for index, one in enumerate(track.foreign)
        if one.offset == -1 and not one.in_backward and ["<", index] in track.backward
    ]
    returned = {index: len(track.sizes) + n for n, index in enumerate(inputs)}

    def release(event: Any) -> Any:
        is_foreign = not isinstance(event, int) and event[0] == "<"
        if is_foreign and event[1] in returned:
            return -1 - returned[event[1]]
        return event

    return dataclasses.replace(
        track,
        sizes=(*track.sizes, *(track.foreign[index].size for index in inputs)),
        forward=(*track.forward, *(["<", index] for index in inputs)),
        backward=(*returned.values(), *map(release, track.backward)),
    )


def unreached_program(
    track: BlockTrack, holes: Sequence[Filling], values: Sizes
) -> Program:
    """The program of a layer that needs no gradient: nothing of it is kept."""
    rest = _made(track.forward) - _released(track.forward)
    forward = (*track.forward, *_releases(rest))
    return _program(track, holes, values, forward, (), len(forward))


def first_program(
    track: BlockTrack, holes: Sequence[Filling], values: Sizes, adapted: Container[int]
) -> Program:
    """The program of a first layer whose input needs no gradient.

    What it makes before its first adapted hole is given back when that begins, but for
    what goes into it; its backward ends with that hole's, and gives the rest back.
    """
    turn = _place(track.forward, "F", adapted)
    end = _place(track.backward, "B", (track.forward[turn][1],)) + 1
    before, after = track.forward[:turn], track.forward[turn:]
    unkept = _made(before) - _released(before) - {track.forward[turn][2]}
    kept = (_made(before) | _made(after) | _made(track.backward[:end])) - unkept
    rest = kept & _released(track.backward[end:])
    forward = (*before, *_releases(unkept), *_without(after, unkept))
    backward = (*_without(track.backward[:end], unkept), *_releases(rest))
    return _program(track, holes, values, forward, backward, turn)


def _program(  # noqa: PLR0913 - each is a part of a layer
    track: BlockTrack,
    holes: Sequence[Filling],
    values: Sizes,
    forward: Events,
    backward: Events,
    num_passing: int,
) -> Program:
    """The program of a layer's events; the first few keep nothing for backward."""
    compiler = _Compiler(
        track.sizes, values, track.lasting, dict(enumerate(holes)), track.foreign
    )
    return Program(
        forward=compiler.write(forward, in_backward=False, num_passing=num_passing),
        backward=compiler.write(backward, in_backward=True),
        num_blocks=compiler.num_blocks,
        made=compiler.made,
    )


def _releases(blocks: Iterable[int]) -> Iterator[int]:
    """The events that release blocks."""
    return (-1 - block for block in sorted(blocks))


def _place(events: Events, kind: str, holes: Container[int]) -> int:
    """Where the first event of that kind of one of the holes is."""
    return next(
        place
        for place, event in enumerate(events)
        if not isinstance(event, int) and event[0] == kind and event[1] in holes
    )


def _made(events: Events) -> set[int]:
    """Blocks that events make, holes' among them."""
    own = {event for event in events if isinstance(event, int) and event >= 0}
    marks = (event for event in events if not isinstance(event, int))
    return own | {mark[3] for mark in marks if mark[0] in "FB" and mark[3] >= 0}


def _released(events: Events) -> set[int]:
    """Blocks that events release or leave to the holes that they went into."""
    own = {-1 - event for event in events if isinstance(event, int) and event < 0}
    marks = (event for event in events if not isinstance(event, int))
    released = (mark for mark in marks if mark[0] == "D" or len(mark) == _OWNING)
    return own | {mark[1] if mark[0] == "D" else mark[2] for mark in released}


_OWNING = 5
"""The length of an event of a hole that lets go of what it takes."""


def _without(events: Events, gone: Container[int]) -> Iterator[Any]:
    """Events but for the releases of blocks that are gone."""
    for event in events:
        block = -1 - event if isinstance(event, int) else event[1]
        is_release = isinstance(event, int) or event[0] == "D"
        if not (is_release and block in gone):
            yield event


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
    turn = next(n for n, event in enumerate(track.tail) if _is_backward(event))
    _, _, _, gradient, *_ = track.tail[turn]
    compiler = _Compiler(
        track.sizes, values, track.lasting, {}, track.before_foreign, loss, gradient
    )
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
