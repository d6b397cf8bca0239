"""Which layers of a stack are traced, and which of these stand for the others.

Layers are of one kind if the model makes them alike and the recipe treats them alike.
A stack falls into sections over which the kinds of layers repeat with a period, and
single layers between them. Of a section, a few layers at both ends and two periods
between them are traced.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass

from transformers.quantizers.quantizers_utils import should_convert_module

from memplan.architecture import Architecture, Block
from memplan.recipe import Recipe
from memplan.training.few_layers import KeptLayers
from memplan.units import round_up

LONGEST_PERIOD = 12
"""Layers after which the kinds of a stack may repeat."""

LAYERS_BEFORE = 2
"""Layers at either end, in whole periods, that stand for themselves: what the first
layer and the last do differently shows in what their neighbours release."""

ALIKE_PERIODS = 2
"""Periods between the ends that must be alike; the first stands for the others."""

LARGEST_SHARE = 0.6
"""The share of a stack from which on leaving layers out is not worth while."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Layers that repeat with a period."""

    start: int
    period: int
    num_periods: int

    @property
    def repeated(self) -> int:
        """The first layer of the period that stands for others."""
        return self.start + _end_length(self.period)

    @property
    def left_out(self) -> range:
        """The layers that are not traced."""
        after = self.start + self.num_periods * self.period - _end_length(self.period)
        return range(self.repeated + ALIKE_PERIODS * self.period, after)

    def stand_in(self, layer: int) -> int:
        """The layer that is written for a layer: itself but for those that repeat."""
        first = self.repeated
        if first <= layer < self.left_out.stop:
            return first + (layer - first) % self.period
        return layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """How a stack repeats. Positions count the traced layers."""

    stack: str
    sections: tuple[Section, ...]
    kept: tuple[int, ...]
    """By position: the number of the layer."""
    representatives: tuple[int, ...]
    """By layer: the position of the one that stands for it."""

    @classmethod
    def of(cls, stack: str, num_layers: int, sections: tuple[Section, ...]) -> Pattern:
        left_out = set(itertools.chain(*(s.left_out for s in sections)))
        kept = tuple(n for n in range(num_layers) if n not in left_out)
        stand_ins = list(range(num_layers))
        for section in sections:
            for layer in range(section.repeated, section.left_out.stop):
                stand_ins[layer] = section.stand_in(layer)
        return cls(
            stack=stack,
            sections=sections,
            kept=kept,
            representatives=tuple(kept.index(layer) for layer in stand_ins),
        )

    @property
    def kept_layers(self) -> KeptLayers:
        """The layers that are built and traced."""
        left_out = {
            layer: self.kept[position]
            for layer, position in enumerate(self.representatives)
            if layer not in self.kept
        }
        return KeptLayers(stack=self.stack, numbers=self.kept, left_out=left_out)

    @property
    def num_layers(self) -> int:
        return len(self.representatives)

    def position(self, path: str) -> int | None:
        """The position of the layer that a module lies in, None outside of layers."""
        match = re.match(rf"{re.escape(self.stack)}\.(\d+)(\.|$)", path)
        return self.kept.index(int(match[1])) if match else None

    def multiplicity(self, path: str) -> int:
        """How many layers that of a module stands for; 1 outside of the stack."""
        position = self.position(path)
        return 1 if position is None else self.representatives.count(position)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Positions that must be alike: of each section's periods in the middle."""
        return tuple(itertools.chain(*map(self._pairs_of, self.sections)))

    def is_pass(self, positions: Container[int | None]) -> bool:
        """Whether those positions go over all layers of some kinds in the sections.

        Beside those that must be alike, the nearest of these kinds on both sides.
        """
        gone_over = False
        for section in self.sections:
            pairs = self._pairs_of(section)
            found = [(a, b) for a, b in pairs if a in positions or b in positions]
            if not found:
                continue
            before = found[-1][0] - section.period
            after = found[0][1] + section.period
            needed = (before, *itertools.chain(*found), after)
            if not all(position in positions for position in needed):
                return False
            gone_over = True
        return gone_over

    def _pairs_of(self, section: Section) -> list[tuple[int, int]]:
        first = self.kept.index(section.repeated)
        period = section.period
        return [(p, p + period) for p in range(first, first + period)]


def find_pattern(architecture: Architecture, recipe: Recipe) -> Pattern | None:
    """How the largest stack repeats; None where the model is to be traced whole."""
    stack = architecture.main_stack
    kinds = layer_kinds(architecture, recipe, stack)
    sections = _sections(kinds)
    pattern = Pattern.of(stack, len(kinds), sections)
    if not sections or len(pattern.kept) > LARGEST_SHARE * len(kinds):
        return None
    return pattern


def layer_kinds(
    architecture: Architecture, recipe: Recipe, stack: str
) -> list[Hashable]:
    """By layer: what the model makes it of, and how the recipe treats it.

    Every n-th layer is checkpointed (`_set_gradient_checkpointing` counts layers).
    """
    every = recipe.every_n_layers if recipe.checkpointing != "none" else 1
    kinds: dict[int, Hashable] = {}
    for number, block in enumerate(architecture.blocks):
        if block.stack == stack:
            for layer, path in zip(block.layers, block.paths, strict=True):
                kinds[layer] = (number, layer % every, *_treatment(block, path, recipe))
    return [kinds[layer] for layer in sorted(kinds)]


def _treatment(block: Block, path: str, recipe: Recipe) -> Iterator[Hashable]:
    """What the recipe's names for modules come to in a layer.

    Of patterns the first that matches counts (peft.utils.other.get_pattern_key).
    """
    paths = [f"{path}.{name}".rstrip(".") for name in _names(block)]
    for pattern in (recipe.rank_pattern, recipe.alpha_pattern, recipe.lambda_pattern):
        keys = [(re.compile(rf"(.*\.)?({key})$"), pattern[key]) for key in pattern]
        if keys:
            yield tuple(
                next((value for key, value in keys if key.match(name)), None)
                for name in paths
            )
    if isinstance(recipe.targets, tuple):
        targets = tuple(f".{target}" for target in recipe.targets)
        yield tuple(f".{name}".endswith(targets) for name in paths)
    yield tuple(name.endswith(recipe.trained_modules) for name in paths)
    if recipe.quantization != "none":
        skipped = list(recipe.unquantized_modules)
        yield tuple(
            should_convert_module(f"{path}.{linear.path}", skipped)
            for linear in block.linears
        )


def _end_length(period: int) -> int:
    """How many layers at either end of a section stand for themselves."""
    return round_up(LAYERS_BEFORE, period)


def _names(block: Block) -> dict[str, None]:
    """Paths within a layer of its modules and parameters, the layer itself included."""
    names: dict[str, None] = {}
    linears = (linear.path for linear in block.linears)
    parameters = (parameter.path for parameter in block.parameters)
    for path in (*linears, *parameters):
        parts = path.split(".")
        names |= dict.fromkeys(".".join(parts[:end]) for end in range(len(parts) + 1))
    return names


def _sections(kinds: list[Hashable]) -> tuple[Section, ...]:
    """The sections with which the fewest layers are traced."""
    num_layers = len(kinds)
    periods = range(1, LONGEST_PERIOD + 1)
    alike = {period: _alike(kinds, period) for period in periods}
    num_traced = [0] * (num_layers + 1)
    """From each layer to the last."""
    chosen: list[Section | None] = [None] * num_layers
    for start in reversed(range(num_layers)):
        num_traced[start] = 1 + num_traced[start + 1]
        for period in periods:
            num_periods = 1 + alike[period][start] // period
            if num_periods == 1:
                continue
            section = Section(start=start, period=period, num_periods=num_periods)
            after = start + num_periods * period
            traced = after - start - len(section.left_out) + num_traced[after]
            if section.left_out and traced < num_traced[start]:
                num_traced[start] = traced
                chosen[start] = section
    return tuple(_chain(chosen))


def _alike(kinds: list[Hashable], period: int) -> list[int]:
    """From each layer on: how many are of the kind of that one period later."""
    counts = [0] * (len(kinds) + 1)
    for layer in reversed(range(len(kinds) - period)):
        if kinds[layer] == kinds[layer + period]:
            counts[layer] = 1 + counts[layer + 1]
    return counts


def _chain(chosen: list[Section | None]) -> Iterator[Section]:
    """The sections that follow one another from the first layer on."""
    layer = 0
    while layer < len(chosen):
        section = chosen[layer]
        if section is None:
            layer += 1
            continue
        yield section
        layer += section.num_periods * section.period
