"""Layers of one kind repeat: few are traced, and their events stand for the others.

The log of a model with few layers falls into stretches (a moment each), and these into
passes over the layers with something before, between and after. What a layer does in a
pass is the same one period later, but for which layer's blocks it releases; that is
checked, and a model of which it is not true is traced whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from memplan.simulator.events import EMPTY_CACHE, FREE, MARK, EventLog
from memplan.simulator.pattern import Pattern

PER_GRADIENT = ("aten._foreach_norm", "aten.stack")
"""Operators of clipping whose outputs or scratch grow with the number of gradients."""

Event = tuple[int, int]

Run = tuple[int | None, list[Event]]
"""Events of one layer, by its position, or outside of layers."""

Place = tuple[int, int, int | None]
"""Part of a log: stretch, item, and layer (None outside of layers), which is told by
its position among the traced ones, or by its number in the whole model."""


def expand(
    log: EventLog, pattern: Pattern, gradients: tuple[int, int]
) -> EventLog | None:
    """The log of the whole model, from that of one with few layers.

    `gradients` are the numbers of trained tensors, traced and whole. None where the
    layers are not alike.
    """
    parsed = _Parser(log, pattern).parse()
    if parsed is None or not all(_repeats(parsed)):
        return None
    try:
        return _Writer(parsed, gradients).write()
    except KeyError:
        # A layer refers to a block that its stand-in does not have.
        return None


@dataclass(slots=True)
class _Item:
    """A part of a stretch: events outside of layers, or one pass over all layers."""

    events: list[Event] = field(default_factory=list)
    layers: dict[int, list[Event]] = field(default_factory=dict)
    """Events by position, in the order of the pass; empty outside of layers."""


@dataclass(slots=True)
class _Stretch:
    """A moment of the log."""

    mark: Event
    items: list[_Item]


@dataclass(slots=True)
class _Parsed:
    """A log taken apart."""

    log: EventLog
    pattern: Pattern
    stretches: list[_Stretch]
    homes: dict[int, tuple[Place, int]]
    """By block: where it is allocated, and its number among the allocations there."""


class _Parser:
    """Takes a log apart into stretches, items and layers."""

    def __init__(self, log: EventLog, pattern: Pattern) -> None:
        self._log = log
        self._pattern = pattern
        positions = {path: pattern.position(path) for path in set(log.modules)}
        self._owners = [positions[path] for path in log.modules]
        """By block: the position of the layer that it belongs to."""
        self._homes: dict[int, tuple[Place, int]] = {}

    def parse(self) -> _Parsed | None:
        stretches = []
        for number, events in enumerate(_split_at_marks(self._log)):
            items = self._items(number, events)
            if items is None:
                return None
            stretches.append(_Stretch(mark=events[0], items=items))
        return _Parsed(
            log=self._log,
            pattern=self._pattern,
            stretches=stretches,
            homes=self._homes,
        )

    def _items(self, stretch: int, events: list[Event]) -> list[_Item] | None:
        """The items of a moment; steps are read by time, lists of tensors by owner."""
        label = self._log.labels[events[0][1]]
        ways = [self._runs_by_owner, self._runs_in_time]
        if label.endswith(("forward", "backward")):
            ways.reverse()
        for runs in ways:
            items = _passes(runs(events[1:]), self._pattern)
            if items is not None:
                for number, item in enumerate(items):
                    self._find_homes(stretch, number, item)
                return items
        return None

    def _runs_in_time(self, events: list[Event]) -> list[Run]:
        merged = _merged(_runs(events, self._tags_in_time(events)))
        return [part for run in merged for part in self._split_by_owner(run)]

    def _runs_by_owner(self, events: list[Event]) -> list[Run]:
        return list(_runs(events, self._tags_by_owner(events)))

    def _tags_in_time(self, events: list[Event]) -> Iterator[int | None]:
        """The layer that is at work: that of the last allocation."""
        tag: int | None = None
        for block, num_bytes in events:
            if block >= 0 and num_bytes != FREE:
                tag = self._owners[block]
            yield tag

    def _tags_by_owner(self, events: list[Event]) -> Iterator[int | None]:
        """The layer that the block belongs to."""
        for block, _ in events:
            yield self._owners[block] if block >= 0 else None

    def _split_by_owner(self, run: Run) -> list[Run]:
        """Releases for all layers in one go, as of autocast's copies, by layer."""
        tag, events = run
        runs = self._runs_by_owner(events)
        for start in range(len(runs)):
            part = _pass_at_start(runs[start:], self._pattern)
            if part:
                rest = runs[start + len(part) :]
                return [*_joined(tag, runs[:start]), *part, *_joined(None, rest)]
        return [run]

    def _find_homes(self, stretch: int, item_number: int, item: _Item) -> None:
        layers: dict[int | None, list[Event]] = dict(item.layers.items())
        for position, events in ({None: item.events} | layers).items():
            for number, block in enumerate(_allocated(events)):
                self._homes[block] = ((stretch, item_number, position), number)


def _allocated(events: list[Event]) -> Iterator[int]:
    """The blocks that are allocated, in order."""
    return (block for block, num_bytes in events if block >= 0 and num_bytes != FREE)


def _split_at_marks(log: EventLog) -> list[list[Event]]:
    """Each moment with its mark first."""
    parts: list[list[Event]] = []
    for event in log.events:
        if event[0] == MARK:
            parts.append([])
        parts[-1].append(event)
    return parts


def _runs(events: list[Event], tags: Iterator[int | None]) -> Iterator[Run]:
    run: list[Event] = []
    current: int | None = None
    for event, tag in zip(events, tags, strict=True):
        if run and tag != current:
            yield current, run
            run = []
        current = tag
        run.append(event)
    if run:
        yield current, run


def _joined(tag: int | None, runs: list[Run]) -> list[Run]:
    """Runs as one of that layer; none where there are none."""
    events = [event for _, run in runs for event in run]
    return [(tag, events)] if events else []


def _merged(
    runs: Iterator[Run],
) -> list[Run]:
    """Runs where what lies between neighbouring layers belongs to the earlier one."""
    merged: list[Run] = []
    for tag, events in runs:
        if merged and merged[-1][0] == tag:
            merged[-1][1].extend(events)
            continue
        between = len(merged) > 1 and merged[-1][0] is None and tag is not None
        before = merged[-2][0] if between else None
        if before is not None and tag is not None and abs(tag - before) <= 1:
            merged[-2][1].extend(merged.pop()[1])
            if tag == before:
                merged[-1][1].extend(events)
                continue
        merged.append((tag, list(events)))
    return merged


def _passes(runs: list[Run], pattern: Pattern) -> list[_Item] | None:
    """The items of a stretch; None where a pass leaves out layers that repeat."""
    repeating = {position for pair in pattern.pairs for position in pair}
    items: list[_Item] = []
    left = list(runs)
    while left:
        part = _pass_at_start(left, pattern)
        if part:
            left = left[len(part) :]
            if left and left[0][0] == part[-2][0]:
                left.insert(0, _split_turn(part))
            items.append(_Item(layers={t: e for t, e in part if t is not None}))
            continue
        tag, events = left.pop(0)
        if tag in repeating:
            return None
        if items and not items[-1].layers:
            items[-1].events.extend(events)
        else:
            items.append(_Item(events=list(events)))
    return items


def _pass_at_start(runs: list[Run], pattern: Pattern) -> list[Run]:
    """The runs that go up or down the layers that repeat; none if there are none."""
    part: list[Run] = []
    for run in runs:
        tags = [tag for tag, _ in (*part[-2:], run)]
        steps = [b - a for a, b in pairwise(tags) if a is not None and b is not None]
        if None in tags or any(step * steps[0] <= 0 for step in steps):
            break
        part.append(run)
    return part if pattern.is_pass({tag for tag, _ in part}) else []


def _split_turn(
    part: list[Run],
) -> Run:
    """What the last layer of a pass does as the first of the next, which turns round.

    It is taken out of `part`. Where exactly does not matter: the layers at both ends
    stand for themselves alone, so that their events stay in order.
    """
    tag, events = part[-1]
    count = min(len(part[-2][1]), len(events) - 1)
    part[-1] = (tag, events[:count])
    return tag, events[count:]


def _repeats(parsed: _Parsed) -> Iterator[bool]:
    """Whether the two periods in the middle do the same, pass by pass."""
    for stretch in parsed.stretches:
        for item in stretch.items:
            if not item.layers:
                continue
            for one, other in parsed.pattern.pairs:
                if one in item.layers:
                    yield _signature(parsed, item.layers[one], one) == (
                        _signature(parsed, item.layers[other], other)
                    )


def _signature(parsed: _Parsed, events: list[Event], position: int) -> list[object]:
    """What a layer does, with blocks named by where they are at home from here."""
    log = parsed.log
    signature: list[object] = []
    for block, num_bytes in events:
        if block < 0:
            signature.append(block)
        elif num_bytes != FREE:
            signature.append((num_bytes, log.operators[block], log.categories[block]))
        else:
            (stretch, item, at), number = parsed.homes[block]
            away = None if at is None else at - position
            signature.append((stretch, item, away, number))
    return signature


_NO_SOURCE = -1
"""The index of what stands for the source of an emptied cache: block 0 and on."""


class _Template:
    """What is done at a place of the traced log, to be written for other layers too."""

    def __init__(self, parsed: _Parsed, place: Place, events: list[Event]) -> None:
        log = parsed.log
        *_, self.position = place
        self.blocks = list(_allocated(events))
        self.sizes = [n for block, n in events if block >= 0 and n != FREE]
        self.operators = [log.operators[block] for block in self.blocks]
        self.categories = [log.categories[block] for block in self.blocks]
        self.modules = [log.modules[block] for block in self.blocks]
        self.sources = [place]
        """Places whose blocks are spoken of."""
        self.events: list[tuple[int, int, int]] = []
        """Index of the source, number of the block there, and bytes or FREE."""
        indices = {place: 0}
        for block, num_bytes in events:
            if block == EMPTY_CACHE:
                self.events.append((_NO_SOURCE, EMPTY_CACHE, num_bytes))
                continue
            source, number = parsed.homes[block]
            index = indices.setdefault(source, len(indices))
            self.events.append((index, number, num_bytes))
        self.sources = list(indices)


class _Writer:
    """Writes the whole model's log from the parts of the traced one's."""

    def __init__(self, parsed: _Parsed, gradients: tuple[int, int]) -> None:
        self._parsed = parsed
        self._pattern = parsed.pattern
        self._gradients = gradients
        self._starts: dict[Place, int] = {}
        """By place in the whole model: the first block that is allocated there."""
        self._copies: list[tuple[int, list[int]]] = []
        """First blocks, and the traced blocks that they and the next are copies of."""
        self._log = EventLog(labels=parsed.log.labels)

    def write(self) -> EventLog | None:
        """The log; None where a block of a layer would live on that should not."""
        for number, stretch in enumerate(self._parsed.stretches):
            self._log.events.append(stretch.mark)
            for item_number, item in enumerate(stretch.items):
                if item.layers:
                    self._write_pass(number, item_number, item)
                else:
                    events = self._scaled(item.events, stretch)
                    place = (number, item_number, None)
                    self._write(_Template(self._parsed, place, events), None)
        return self._log if self._releases_alike() else None

    def _write_pass(self, stretch: int, number: int, item: _Item) -> None:
        templates = {
            position: _Template(self._parsed, (stretch, number, position), events)
            for position, events in item.layers.items()
        }
        first, second, *_ = item.layers
        layers = range(self._pattern.num_layers)
        for layer in layers if first < second else reversed(layers):
            template = templates.get(self._pattern.representatives[layer])
            if template is not None:
                self._write(template, layer)

    def _write(self, template: _Template, layer: int | None) -> None:
        """Writes for a layer what its stand-in did."""
        log = self._log
        places = [self._seen(place, template, layer) for place in template.sources]
        start = self._starts[places[0]] = len(log.sizes)
        self._copies.append((start, template.blocks))
        log.sizes += template.sizes
        log.operators += template.operators
        log.categories += template.categories
        log.modules += self._renamed(template, layer)
        starts = [self._starts[place] for place in places]
        starts.append(0)
        log.events += [
            (starts[source] + number, num_bytes)
            for source, number, num_bytes in template.events
        ]

    def _seen(self, place: Place, template: _Template, layer: int | None) -> Place:
        """The place in the whole model that a place is, seen from a layer."""
        stretch, item, position = place
        if position is None:
            return place
        if layer is None or template.position is None:
            return stretch, item, self._pattern.kept[position]
        return stretch, item, layer + position - template.position

    def _renamed(self, template: _Template, layer: int | None) -> list[str]:
        """The modules of a template's blocks where a layer is at work."""
        if layer is None or template.position is None:
            return template.modules
        traced = self._pattern.kept[template.position]
        if layer == traced:
            return template.modules
        old, new = (f"{self._pattern.stack}.{n}." for n in (traced, layer))
        renamed = {
            path: f"{path}.".replace(old, new, 1)[:-1] for path in set(template.modules)
        }
        return [renamed[path] for path in template.modules]

    def _scaled(self, events: list[Event], stretch: _Stretch) -> list[Event]:
        """What clipping allocates for each gradient, for all of them."""
        if not self._log.labels[stretch.mark[1]].endswith("clip"):
            return events
        traced, whole = self._gradients
        operators = self._parsed.log.operators
        return [
            (block, num_bytes // traced * whole)
            if num_bytes > 0
            and num_bytes % traced == 0
            and operators[block].startswith(PER_GRADIENT)
            else (block, num_bytes)
            for block, num_bytes in events
        ]

    def _releases_alike(self) -> bool:
        """Whether every block is released as often as the one it is a copy of."""
        traced = _releases(self._parsed.log)
        copies = _releases(self._log)
        return all(
            copies[start : start + len(blocks)] == bytes(traced[b] for b in blocks)
            for start, blocks in self._copies
        )


def _releases(log: EventLog) -> bytearray:
    """By block: how often it is released, which is once at most."""
    counts = bytearray(len(log.sizes))
    for block, num_bytes in log.events:
        if num_bytes == FREE and block >= 0:
            counts[block] += 1
    return counts
