"""What the lengths of a data set make of a fine-tune: its longest batch is its peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from memplan import estimator
from memplan.architecture import Architecture
from memplan.errors import InputError, MissingExtraError
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.lengths import Lengths
from memplan.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro-batch as a way to make them makes it."""

    name: str
    """`p50`, `p99`, `longest`, `packed`, `padding-free` or `padding-free mean`."""
    recipe: Recipe
    """Its shape is the batch's."""
    footprint: Footprint | None
    """None where it cannot run."""
    problem: str = ""
    """Why it cannot run."""

    def to_json(self) -> dict[str, Any]:
        """The batch as output shows it."""
        footprint = self.footprint
        return {
            "name": self.name,
            "batch_size": self.recipe.batch_size,
            "sequence_length": self.recipe.sequence_length,
            "padded": self.recipe.padded,
            "peak": None if footprint is None else footprint.peak_json(footprint.peak),
            "fits": None if footprint is None else footprint.fits,
            "problem": self.problem or None,
        }


def longest_batch(recipe: Recipe, lengths: Lengths, *, padded: bool | None) -> Recipe:
    """The recipe at the batch that decides its peak: one that holds the longest sample.

    Others in it are padded to that length, for which a mask is made unless `padded`
    says otherwise.
    """
    needs_mask = recipe.batch_size > 1 and lengths.differ
    return dataclasses.replace(
        recipe,
        sequence_length=lengths.longest,
        padded=needs_mask if padded is None else padded,
    )


def batches(
    architecture: Architecture, recipe: Recipe, gpu: Gpu | None, lengths: Lengths
) -> tuple[Batch, ...]:
    """Batches that padding, packing and padding-free training make, estimated.

    `recipe` is that of the longest batch.
    """
    return tuple(
        _estimated(architecture, gpu, name, shaped)
        for name, shaped in _shapes(recipe, lengths)
    )


def lengths_json(found: Lengths, made: Sequence[Batch]) -> dict[str, Any]:
    """The lengths and the batches that they make, as output shows them."""
    return found.to_json() | {"batches": [one.to_json() for one in made]}


def fewer_steps(recipe: Recipe, lengths: Lengths) -> float:
    """The share of the steps that packing saves: batches are full instead of padded."""
    padded = lengths.num_samples / recipe.batch_size
    packed = lengths.num_tokens / (recipe.batch_size * lengths.longest)
    return max(1 - packed / padded, 0.0)


def _shapes(recipe: Recipe, lengths: Lengths) -> Iterator[tuple[str, Recipe]]:
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        length = lengths.percentile(share)
        yield name, dataclasses.replace(recipe, sequence_length=length)
    yield "longest", recipe
    yield "packed", dataclasses.replace(recipe, padded=False)
    flat = dataclasses.replace(recipe, batch_size=1, padded=False)
    most = lengths.longest_tokens(recipe.batch_size)
    yield "padding-free", dataclasses.replace(flat, sequence_length=most)
    usual = max(round(lengths.mean * recipe.batch_size), 1)
    yield "padding-free mean", dataclasses.replace(flat, sequence_length=usual)


def _estimated(
    architecture: Architecture, gpu: Gpu | None, name: str, recipe: Recipe
) -> Batch:
    try:
        footprint = estimator.run(architecture, recipe, gpu).footprint
    except MissingExtraError:
        raise
    except InputError as error:
        return Batch(name=name, recipe=recipe, footprint=None, problem=str(error))
    return Batch(name=name, recipe=recipe, footprint=footprint)
