"""Tracks: the blocks of a tape one by one, in the order in which they come and go.

A tape says how much is live; its track says in which blocks, which is what the caching
allocator's rules ask for. Sizes are polynomials as a tape's are. Blocks have numbers of
their own in each track; a block that another part of the step made is released by where
it was made and by its size.

Events are numbers and lists: k >= 0 makes block k; -1 - k releases it; ["F", h, i, o]
and ["B", h, i, o] are the forward and backward of hole h, which takes block i and makes
block o (-1: no block of this track), and with a fifth item lets go of block i; ["D", k,
holes] drops block k, which went into holes; ["<", j] releases a block of the j-th kind
of foreign ones; ["?", k] releases block k if it is still there; in a hole, "x" releases
what its forward was given and "y" what its backward was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memplan.tape import Polynomial

Events = tuple[Any, ...]
"""Events as the module says; tuples that JSON turned into lists are as good."""

INPUT = "x"
"""Releases what a hole was given."""

OUTPUT_GRADIENT = "y"
"""Releases the gradient that a hole's backward was given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """A block that another layer made, or what comes before or after the layers."""

    offset: int
    """How many layers further on it was made; before and after count as layers."""
    in_backward: bool
    """Whether it was made in backward."""
    size: Polynomial


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTrack:
    """A layer's blocks."""

    sizes: tuple[Polynomial, ...]
    lasting: tuple[int, ...]
    """Blocks that outlive the step: gradients."""
    foreign: tuple[Foreign, ...]
    forward: Events
    backward: Events


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTrack:
    """The blocks of a model's step; what is around the layers shares its numbers."""

    sizes: tuple[Polynomial, ...]
    lasting: tuple[int, ...]
    before_foreign: tuple[Foreign, ...]
    """What `before` and `after` release of layers, from one place before them."""
    tail_foreign: tuple[Foreign, ...]
    """What `tail` releases of layers, from one place after them."""
    before: Events
    tail: Events
    after: Events
    blocks: tuple[BlockTrack, ...]
    """By the kinds of layers, as in the tape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTrack:
    """A linear layer's blocks; each list of sizes belongs to one run's numbers."""

    sizes: tuple[Polynomial, ...]
    lasting: tuple[int, ...]
    output: int
    input_gradient: int
    forward: Events
    backward: Events
    ahead: int
    """Events of backward before it asks for what forward kept."""
    passing_sizes: tuple[Polynomial, ...]
    passing_output: int
    passing: Events
    adapt_sizes: tuple[Polynomial, ...]
    adapt: Events
    """While the method is installed; what is left are the adapters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTrack:
    """The blocks of head and loss at each number of tokens."""

    tokens: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    lasting: tuple[tuple[int, ...], ...]
    input_gradient: tuple[int, ...]
    forward: tuple[Events, ...]
    backward: tuple[Events, ...]


def to_json(value: Any) -> Any:
    """A track, or a part of one, as lists and mappings."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def model_track(data: Mapping[str, Any]) -> ModelTrack:
    """The track that `to_json` wrote."""
    told = dict(data)
    return ModelTrack(
        before_foreign=_foreign(told.pop("before_foreign")),
        tail_foreign=_foreign(told.pop("tail_foreign")),
        blocks=tuple(_block(block) for block in told.pop("blocks")),
        **told,
    )


def layer_track(data: Mapping[str, Any]) -> LayerTrack:
    """The track that `to_json` wrote."""
    return LayerTrack(**data)


def loss_track(data: Mapping[str, Any]) -> LossTrack:
    """The track that `to_json` wrote."""
    return LossTrack(**data)


def _block(data: Mapping[str, Any]) -> BlockTrack:
    told = dict(data)
    return BlockTrack(foreign=_foreign(told.pop("foreign")), **told)


def _foreign(data: Any) -> tuple[Foreign, ...]:
    return tuple(Foreign(**one) for one in data)
