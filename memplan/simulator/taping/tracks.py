"""Tracks read off the same runs as tapes: every block, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from memplan.simulator.events import FREE, MARK
from memplan.simulator.taping.holes import Event, HoleMark, TapeTracer, let_go_of
from memplan.tape import LOSS, Polynomial
from memplan.track import BlockTrack, Foreign, ModelTrack

OUTSIDE = -2
"""The place of a block that no span makes."""


class ModelTracks:
    """Writes the tracks of a step that was taken apart into spans.

    Places are positions of layers; one before the first is what comes before and after
    them, one after the last is the tail.
    """

    def __init__(
        self,
        sizes: list[Polynomial],
        forward: dict[int, list[Event]],
        backward: dict[int, list[Event]],
        numbers: dict[int, int],
        left_out: Iterable[int],
    ) -> None:
        self._sizes = sizes
        self._numbers = numbers
        self._left_out = set(left_out)
        """Blocks whose bytes are counted otherwise."""
        spans = [(place, False, events) for place, events in forward.items()]
        spans += [(place, True, events) for place, events in backward.items()]
        self._origin = {
            event[0]: (place, in_backward)
            for place, in_backward, events in spans
            for event in events
            if not isinstance(event, HoleMark) and event[1] != FREE
        }
        self._forward, self._backward = forward, backward
        self._freed = {
            event[0]
            for _, _, events in spans
            for event in events
            if not isinstance(event, HoleMark) and event[1] == FREE
        }

    def block(self, place: int) -> BlockTrack:
        """The track of the layer in a place."""
        writer = _Writer(self, (place,))
        forward = writer.write(self._forward[place], place)
        backward = writer.write(self._backward[place], place)
        return BlockTrack(
            sizes=writer.sizes,
            lasting=writer.lasting,
            foreign=tuple(writer.foreign),
            forward=forward,
            backward=backward,
        )

    def model(self, blocks: tuple[BlockTrack, ...], num_layers: int) -> ModelTrack:
        """The track of the model around the tracks of its layers."""
        around = _Writer(self, (-1, num_layers))
        before = around.write(self._forward[-1], -1)
        tail_writer = around.sharing()
        late = around.late(self._forward[place] for place in range(num_layers))
        tail = late + tail_writer.write(
            [*self._forward[num_layers], *self._backward[num_layers]], num_layers
        )
        late = around.late(self._backward[place] for place in range(num_layers))
        after = late + around.write(self._backward[-1], -1)
        return ModelTrack(
            sizes=around.sizes,
            lasting=around.lasting,
            before_foreign=tuple(around.foreign),
            tail_foreign=tuple(tail_writer.foreign),
            before=before,
            tail=tail,
            after=after,
            blocks=blocks,
        )

    def size(self, block: int) -> Polynomial:
        return self._sizes[block]

    def origin(self, block: int) -> tuple[int, bool]:
        return self._origin.get(block, (OUTSIDE, False))

    def is_left_out(self, block: int) -> bool:
        return block in self._left_out

    def lasts(self, block: int) -> bool:
        return block not in self._freed

    def hole(self, mark: HoleMark) -> int:
        return self._numbers.get(mark.hole, LOSS)


class _Writer:
    """Writes spans of one part as events with numbers of its own."""

    def __init__(self, tracks: ModelTracks, places: tuple[int, ...]) -> None:
        self._tracks = tracks
        self._places = places
        self._known: dict[int, int] = {}
        """Numbers by block."""
        self.foreign: list[Foreign] = []

    def sharing(self) -> _Writer:
        """A writer of another place, with the same blocks."""
        other = _Writer(self._tracks, self._places)
        other._known = self._known
        return other

    @property
    def sizes(self) -> tuple[Polynomial, ...]:
        return tuple(self._tracks.size(block) for block in self._known)

    @property
    def lasting(self) -> tuple[int, ...]:
        return tuple(
            number for block, number in self._known.items() if self._tracks.lasts(block)
        )

    def write(self, events: list[Event], place: int) -> tuple[Any, ...]:
        """The span's events."""
        inputs: dict[int, tuple[int, ...]] = {}
        for event in events:
            if isinstance(event, HoleMark) and event.kind == "F":
                hole = self._tracks.hole(event)
                inputs[event.block] = (*inputs.get(event.block, ()), hole)
        written: list[Any] = []
        begun: HoleMark | None = None
        let_go = let_go_of(events)
        let_go_blocks = set(let_go.values())
        for event in events:
            if isinstance(event, HoleMark):
                if event.kind in "FB":
                    begun = event
                    continue
                assert begun is not None
                hole = self._tracks.hole(event)
                ends = (self._own(begun.block), self._own(event.block))
                owns = begun.kind == "B" and event.hole in let_go
                own = [1] if owns and self._is_own(begun.block) else []
                written.append([begun.kind, hole, *ends, *own])
                begun = None
                continue
            block, size = event
            if self._tracks.is_left_out(block):
                continue
            if size == FREE and block in let_go_blocks and self._is_own(block):
                continue
            if size != FREE:
                if begun is None:
                    written.append(self._own(block))
            elif block in inputs and self._is_own(block):
                written.append(["D", self._own(block), list(inputs[block])])
            elif self._is_own(block):
                written.append(-1 - self._own(block))
            else:
                self._release_foreign(block, place, written)
        return tuple(written)

    def late(self, spans: Iterable[list[Event]]) -> tuple[Any, ...]:
        """Releases what other places release of this part's, if it is still there.

        The first and the last layer do what those in the middle do not.
        """
        return tuple(
            ["?", self._own(event[0])]
            for events in spans
            for event in events
            if not isinstance(event, HoleMark)
            and event[1] == FREE
            and self._is_own(event[0])
            and not self._tracks.is_left_out(event[0])
        )

    def _is_own(self, block: int) -> bool:
        return self._tracks.origin(block)[0] in self._places

    def _own(self, block: int) -> int:
        if block < 0 or not self._is_own(block):
            return -1
        return self._known.setdefault(block, len(self._known))

    def _release_foreign(self, block: int, place: int, written: list[Any]) -> None:
        made, in_backward = self._tracks.origin(block)
        if made == OUTSIDE:
            return
        one = Foreign(
            offset=made - place,
            in_backward=in_backward,
            size=self._tracks.size(block),
        )
        if one not in self.foreign:
            self.foreign.append(one)
        written.append(["<", self.foreign.index(one)])


class Span:
    """Writes the events of one run between marks; some blocks have other names."""

    def __init__(self, tracer: TapeTracer, given: Mapping[int, str]) -> None:
        self._log = tracer.log
        self._given = given
        """What to write where a block is released that was given."""
        self._known: dict[int, int] = {}
        self._freed = {block for block, size in self._log.events if size == FREE}

    def write(
        self, begin: int, end: int, ignored: tuple[int, ...] = ()
    ) -> tuple[Any, ...]:
        """The events from one place of the log to another."""
        written: list[Any] = []
        for block, size in self._log.events[begin:end]:
            if block == MARK or block in ignored:
                continue
            if block in self._given:
                written += [self._given[block]] if size == FREE else []
            elif size != FREE:
                written.append(self.number(block))
            elif block in self._known:
                written.append(-1 - self._known[block])
        return tuple(written)

    def number(self, block: int) -> int:
        return self._known.setdefault(block, len(self._known))

    @property
    def blocks(self) -> list[int]:
        """The blocks by their numbers."""
        return list(self._known)

    @property
    def lasting(self) -> tuple[int, ...]:
        """Numbers of the blocks that nothing releases."""
        return tuple(
            number for block, number in self._known.items() if block not in self._freed
        )

    def is_workspace(self, block: int) -> bool:
        """Whether it is a library's workspace, kept for the life of its handle."""
        return self._log.categories[block] == "workspace" and block not in self._freed
