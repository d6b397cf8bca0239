"""Layers of one kind repeat: few are traced, and their events stand for the others.

A stack of layers is shortened to its head, four periods of its kinds, and its last two
periods with the tail. The log of the short model falls into stretches (a moment each),
and these into passes over the layers with something before, between and after. What a
layer does in a pass is the same one period later, but for which layer's blocks it
releases; that is checked, and a model of which it is not true is traced whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from memplan.architecture import Architecture
from memplan.recipe import Recipe
from memplan.simulator.events import EMPTY_CACHE, FREE, MARK, EventLog

LONGEST_PERIOD = 12
"""Layers after which the kinds of a stack may repeat."""

LONGEST_HEAD = 6
"""Layers before the repetition, such as the dense ones of a mixture of experts."""

PERIODS_BEFORE = 2
"""Periods at either end that stand for themselves: what the first layer and the last do
differently shows in what their neighbours release."""

TRACED_PERIODS = 2 * PERIODS_BEFORE + 2
"""Between the ends, two that must be alike; the first stands for the others."""

LARGEST_SHARE = 0.6
"""The share of a stack from which on shortening it is not worth while."""

PER_GRADIENT = ("aten._foreach_norm", "aten.stack")
"""Operators of clipping whose outputs or scratch grow with the number of gradients."""

Event = tuple[int, int]

Run = tuple[int | None, list[Event]]
"""Events of one layer, by its position, or outside of layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """Which layers of a stack are traced, and which of these stand for the others."""

    stack: str
    num_layers: int
    head: int
    period: int
    num_periods: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that are traced."""
        first = range(self.repeated + 2 * self.period)
        return (*first, *range(self.end, self.num_layers))

    @property
    def repeated(self) -> int:
        """The first layer of the period that stands for others."""
        return self.head + PERIODS_BEFORE * self.period

    @property
    def end(self) -> int:
        """The first layer of those at the end that stand for themselves."""
        return self.head + (self.num_periods - PERIODS_BEFORE) * self.period

    def representative(self, layer: int) -> int:
        """The position among the traced layers of the one that stands for a layer."""
        if layer < self.repeated + self.period:
            return layer
        if layer >= self.end:
            return len(self.kept) - (self.num_layers - layer)
        return self.repeated + (layer - self.head) % self.period

    def stands_for_others(self, position: int) -> bool:
        """Whether the traced layer at a position is one of those that repeat."""
        return self.repeated <= position < self.repeated + 2 * self.period

    def renumber(self, path: str) -> str:
        """A path of the whole model in the shortened one."""
        layer = self.position(path)
        if layer is None or layer not in self.kept:
            return path
        position = self.kept.index(layer)
        return path.replace(f"{self.stack}.{layer}", f"{self.stack}.{position}", 1)

    def layer_of(self, position: int) -> int:
        """The layer that stands at a position among the traced ones."""
        return self.kept[position]

    def position(self, path: str) -> int | None:
        """The number after the stack's path in a module's path, None outside of it."""
        match = re.match(rf"{re.escape(self.stack)}\.(\d+)(\.|$)", path)
        return int(match[1]) if match else None


def find_pattern(architecture: Architecture, recipe: Recipe) -> Pattern | None:
    """How the largest stack repeats; None where the model is to be traced whole.

    A recipe that names single layers, or checkpoints every n-th, tells layers apart.
    """
    if recipe.every_n_layers > 1 or _names_layers(recipe):
        return None
    stacks: dict[str, int] = {}
    for block in architecture.blocks:
        size = block.num_parameters * len(block.layers)
        stacks[block.stack] = stacks.get(block.stack, 0) + size
    stack = max(stacks, key=stacks.__getitem__)
    kinds: dict[int, int] = {}
    for kind, block in enumerate(architecture.blocks):
        if block.stack == stack:
            kinds.update(dict.fromkeys(block.layers, kind))
    return _shortest(stack, [kinds[layer] for layer in sorted(kinds)])


def shorten(model: nn.Module, pattern: Pattern) -> nn.ModuleList:
    """Takes all but the traced layers out of a model; the list they were in.

    The list must be held as long as its tensors are to be counted.
    """
    whole = model.get_submodule(pattern.stack)
    assert isinstance(whole, nn.ModuleList)
    parent, _, name = pattern.stack.rpartition(".")
    short = nn.ModuleList([whole[layer] for layer in pattern.kept])
    setattr(model.get_submodule(parent), name, short)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == pattern.num_layers:
            setattr(config, key, [value[layer] for layer in pattern.kept])
    return whole


def multiplicity(pattern: Pattern, path: str) -> int:
    """How many layers the one of a module's path stands for; 1 outside of the stack."""
    position = pattern.position(path)
    if position is None:
        return 1
    return sum(
        pattern.representative(layer) == position for layer in range(pattern.num_layers)
    )


def expand(
    log: EventLog,
    loaded_modules: list[str],
    pattern: Pattern,
    gradients: tuple[int, int],
) -> EventLog | None:
    """The log of the whole model, from that of the shortened one after a whole load.

    `loaded_modules` are the paths of the load's blocks in the whole model; `gradients`
    are the numbers of trained tensors, shortened and whole. None where the layers are
    not alike.
    """
    parsed = _Parser(log, loaded_modules, pattern).parse()
    if parsed is None or not all(_repeats(parsed, pattern)):
        return None
    try:
        return _Writer(parsed, loaded_modules, gradients).write()
    except KeyError:
        # A layer refers to a block that its stand-in does not have.
        return None


def _names_layers(recipe: Recipe) -> bool:
    names = (
        *recipe.rank_pattern,
        *recipe.alpha_pattern,
        *recipe.lambda_pattern,
        *recipe.trained_modules,
        *recipe.unquantized_modules,
        *(recipe.targets if isinstance(recipe.targets, tuple) else ()),
    )
    return any(re.search(r"\d", name) for name in names)


def _shortest(stack: str, kinds: list[int]) -> Pattern | None:
    """The pattern of the fewest traced layers."""
    best: Pattern | None = None
    for period in range(1, LONGEST_PERIOD + 1):
        for head in range(LONGEST_HEAD + 1):
            num_periods = _count_periods(kinds, head, period)
            if num_periods <= TRACED_PERIODS:
                continue
            pattern = Pattern(
                stack=stack,
                num_layers=len(kinds),
                head=head,
                period=period,
                num_periods=num_periods,
            )
            if best is None or len(pattern.kept) < len(best.kept):
                best = pattern
    if best is None or len(best.kept) > LARGEST_SHARE * len(kinds):
        return None
    return best


def _count_periods(kinds: list[int], head: int, period: int) -> int:
    """Whole periods from `head` on over which the kinds repeat."""
    end = head
    while end + period < len(kinds) and kinds[end] == kinds[end + period]:
        end += 1
    return (end + period - head) // period if end > head else 0


@dataclass(slots=True)
class _Item:
    """A part of a stretch: events outside of layers, or one pass over all layers."""

    events: list[Event] = field(default_factory=list)
    layers: dict[int, list[Event]] = field(default_factory=dict)
    """Events by position, in the order of the pass; empty outside of layers."""


@dataclass(slots=True)
class _Stretch:
    """A moment of the log, or the load."""

    mark: Event | None
    items: list[_Item]


Home = tuple[int, int, int | None, int]
"""Where a block is allocated: stretch, item, position (None outside of layers), and
number among the allocations there."""


@dataclass(slots=True)
class _Parsed:
    """A log taken apart, and the home of each of its blocks."""

    log: EventLog
    pattern: Pattern
    load: list[Event]
    stretches: list[_Stretch]
    homes: dict[int, Home]
    loads: dict[tuple[int | None, int], int]
    """The load's blocks by layer of the whole model and number within it."""


_LOAD = -1
"""The stretch that the load's blocks are at home in."""


class _Parser:
    """Takes a log apart into stretches, items and layers."""

    def __init__(
        self, log: EventLog, loaded_modules: list[str], pattern: Pattern
    ) -> None:
        self._log = log
        self._pattern = pattern
        self._loaded_modules = loaded_modules
        self._position_of_layer = {
            layer: position for position, layer in enumerate(pattern.kept)
        }
        self._homes: dict[int, Home] = {}
        self._loads: dict[tuple[int | None, int], int] = {}

    def parse(self) -> _Parsed | None:
        load, *moments = _split_at_marks(self._log)
        self._find_homes_of_load()
        stretches = []
        for number, events in enumerate(moments):
            items = self._items(number, events)
            if items is None:
                return None
            stretches.append(_Stretch(mark=events[0], items=items))
        return _Parsed(
            log=self._log,
            pattern=self._pattern,
            load=load,
            stretches=stretches,
            homes=self._homes,
            loads=self._loads,
        )

    def _find_homes_of_load(self) -> None:
        counts: dict[int | None, int] = {}
        for block, path in enumerate(self._loaded_modules):
            layer = self._pattern.position(path)
            number = counts.get(layer, 0)
            counts[layer] = number + 1
            self._loads[layer, number] = block
            position = self._position_of_layer.get(layer) if layer is not None else None
            if layer is None or position is not None:
                self._homes[block] = (_LOAD, 0, position, number)

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
                tag = self._pattern.position(self._log.modules[block])
            yield tag

    def _tags_by_owner(self, events: list[Event]) -> Iterator[int | None]:
        """The layer that the block belongs to."""
        for block, _ in events:
            yield self._owner(block) if block >= 0 else None

    def _owner(self, block: int) -> int | None:
        if block < len(self._loaded_modules):
            return self._homes.get(block, (0, 0, None, 0))[2]
        return self._pattern.position(self._log.modules[block])

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
        places = {None: item.events, **layers}
        for position, events in places.items():
            number = 0
            for block, num_bytes in events:
                if block >= 0 and num_bytes != FREE:
                    self._homes[block] = (stretch, item_number, position, number)
                    number += 1


def _split_at_marks(log: EventLog) -> list[list[Event]]:
    """The load, then each moment with its mark first."""
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
        if tag is not None and pattern.stands_for_others(tag):
            return None
        if items and not items[-1].layers:
            items[-1].events.extend(events)
        else:
            items.append(_Item(events=list(events)))
    return items


def _pass_at_start(runs: list[Run], pattern: Pattern) -> list[Run]:
    """The runs that go up or down all layers that repeat; none if there are none."""
    part: list[Run] = []
    for run in runs:
        tags = [tag for tag, _ in (*part[-2:], run)]
        steps = [b - a for a, b in pairwise(tags) if a is not None and b is not None]
        if None in tags or any(abs(step) != 1 or step != steps[0] for step in steps):
            break
        part.append(run)
    positions = {tag for tag, _ in part}
    middle = range(pattern.repeated - 1, pattern.repeated + 2 * pattern.period + 1)
    return part if positions >= set(middle) else []


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


def _repeats(parsed: _Parsed, pattern: Pattern) -> Iterator[bool]:
    """Whether the two periods in the middle do the same, pass by pass."""
    first = pattern.repeated
    for stretch in parsed.stretches:
        for item in stretch.items:
            if not item.layers:
                continue
            for position in range(first, first + pattern.period):
                later = position + pattern.period
                yield _signature(parsed, item.layers[position], position) == (
                    _signature(parsed, item.layers[later], later)
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
            stretch, item, at, number = parsed.homes[block]
            away = None if at is None else at - position
            signature.append((stretch, item, away, number))
    return signature


class _Writer:
    """Writes the whole model's log from the parts of the shortened one's."""

    def __init__(
        self, parsed: _Parsed, loaded_modules: list[str], gradients: tuple[int, int]
    ) -> None:
        self._parsed = parsed
        self._pattern = parsed.pattern
        self._gradients = gradients
        self._new: dict[Home, int] = {}
        """New blocks by home, the position being the layer of the whole model."""
        old = parsed.log
        count = len(loaded_modules)
        self._log = EventLog(
            events=list(parsed.load),
            labels=old.labels,
            categories=old.categories[:count],
            operators=old.operators[:count],
            modules=loaded_modules,
            sizes=old.sizes[:count],
        )

    def write(self) -> EventLog | None:
        """The log; None where a block of a layer would live on that should not."""
        for number, stretch in enumerate(self._parsed.stretches):
            if stretch.mark is not None:
                self._log.events.append(stretch.mark)
                label = self._log.labels[stretch.mark[1]]
            for item_number, item in enumerate(stretch.items):
                self._write_item((number, item_number), item, label)
        return self._log if self._releases_alike() else None

    def _releases_alike(self) -> bool:
        """Whether a block is released, once, where the one it is a copy of is."""
        released = [b for b, n in self._log.events if n == FREE and b >= 0]
        if len(set(released)) != len(released):
            return False
        of_copies = set(released)
        of_traced = {b for b, n in self._parsed.log.events if n == FREE and b >= 0}
        traced = {home: block for block, home in self._parsed.homes.items()}
        for (stretch, item, layer, number), copy in self._new.items():
            position = None if layer is None else self._pattern.representative(layer)
            block = traced[stretch, item, position, number]
            if (block in of_traced) != (copy in of_copies):
                return False
        return True

    def _write_item(self, at: tuple[int, int], item: _Item, label: str) -> None:
        if not item.layers:
            self._write_events(at, item.events, None, None, label)
            return
        first, second, *_ = item.layers
        layers = range(self._pattern.num_layers)
        for layer in layers if first < second else reversed(layers):
            position = self._pattern.representative(layer)
            if position in item.layers:
                self._write_events(at, item.layers[position], layer, position, label)

    def _write_events(
        self,
        at: tuple[int, int],
        events: list[Event],
        layer: int | None,
        position: int | None,
        label: str,
    ) -> None:
        number = 0
        for block, num_bytes in events:
            if block == EMPTY_CACHE:
                self._log.empty_cache()
            elif num_bytes == FREE:
                self._log.free(self._resolved(block, layer, position))
            else:
                new = self._allocate(block, num_bytes, layer, position, label)
                self._new[(*at, layer, number)] = new
                number += 1

    def _allocate(
        self,
        block: int,
        num_bytes: int,
        layer: int | None,
        position: int | None,
        label: str,
    ) -> int:
        old = self._parsed.log
        path = old.modules[block]
        if layer is not None and layer != position:
            path = path.replace(
                f"{self._pattern.stack}.{position}", f"{self._pattern.stack}.{layer}", 1
            )
        elif layer is None:
            num_bytes = self._scaled(block, num_bytes, label)
        new = len(self._log.sizes)
        self._log.sizes.append(num_bytes)
        self._log.operators.append(old.operators[block])
        self._log.modules.append(path)
        self._log.categories.append(old.categories[block])
        self._log.events.append((new, num_bytes))
        return new

    def _scaled(self, block: int, num_bytes: int, label: str) -> int:
        """What clipping allocates for each gradient, for all of them."""
        if not label.endswith("clip"):
            return num_bytes
        short, whole = self._gradients
        operator = self._parsed.log.operators[block]
        if not operator.startswith(PER_GRADIENT) or num_bytes % short:
            return num_bytes
        return num_bytes // short * whole

    def _resolved(self, block: int, layer: int | None, position: int | None) -> int:
        """The new block that stands for an old one, seen from a layer."""
        stretch, item, at, number = self._parsed.homes[block]
        target = self._target(at, layer, position)
        if stretch == _LOAD:
            return self._parsed.loads[target, number]
        return self._new[stretch, item, target, number]

    def _target(
        self, at: int | None, layer: int | None, position: int | None
    ) -> int | None:
        """The layer of the whole model at which a block is at home."""
        if at is None:
            return None
        if layer is None or position is None:
            return self._pattern.layer_of(at)
        return layer + at - position
