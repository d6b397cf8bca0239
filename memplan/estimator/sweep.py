"""`sweep`: many recipes at once, as arrays of batch, sequence, rank and card."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.estimator.moments import peak_bytes
from memplan.estimator.schedule import parts_of, step_of
from memplan.gpu import Gpu
from memplan.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Estimates of many recipes, each an array of their common shape."""

    allocated_bytes: Any
    """The training steps' peak, as torch.cuda.max_memory_allocated would say."""
    device_bytes: Any
    """With the card's context and paged memory."""
    fits: Any
    """Whether the card's capacity suffices."""


def sweep(  # noqa: PLR0913 - each is an axis
    architecture: Architecture,
    recipe: Recipe,
    gpus: Sequence[Gpu],
    *,
    batch_size: Any = None,
    sequence_length: Any = None,
    rank: Any = None,
    card: Any = 0,
) -> Sweep:
    """Peaks for arrays of batch, sequence, rank and card, which are broadcast.

    `card` holds indices into `gpus`; what is not given is the recipe's. Raises
    InputError where a rank pattern leaves nothing of the ranks.
    """
    import numpy as np

    if rank is not None and recipe.rank_pattern:
        raise InputError(
            "rank_pattern",
            dict(recipe.rank_pattern),
            "sets ranks of its own, which a sweep of ranks would not change",
            "leave one of the two out",
        )
    batch, length, ranks, cards = np.broadcast_arrays(
        recipe.batch_size if batch_size is None else batch_size,
        recipe.sequence_length if sequence_length is None else sequence_length,
        recipe.rank if rank is None else rank,
        card,
    )
    allocated = np.zeros(batch.shape, dtype=np.int64)
    device = np.zeros(batch.shape, dtype=np.int64)
    fits = np.zeros(batch.shape, dtype=bool)
    for chosen, ranked, gpu in _groups(recipe, gpus, ranks, cards):
        for part, same in _windows(architecture, ranked, gpu, length, chosen):
            parts = parts_of(architecture, part, gpu)
            step = step_of(parts, batch[same], length[same])
            peak = np.rint(peak_bytes(parts, step)).astype(np.int64)
            allocated[same] = peak
            device[same] = peak + gpu.context_bytes + parts.paged
            fits[same] = (
                peak + gpu.context_bytes <= gpu.capacity_bytes - gpu.reserve_bytes
            )
    return Sweep(allocated_bytes=allocated, device_bytes=device, fits=fits)


def _groups(
    recipe: Recipe, gpus: Sequence[Gpu], ranks: Any, cards: Any
) -> Iterator[tuple[Any, Recipe, Gpu]]:
    """Which of the recipes have one rank and one card, and both of these."""
    import numpy as np

    for rank in np.unique(ranks):
        for card in np.unique(cards):
            chosen = (ranks == rank) & (cards == card)
            if chosen.any():
                alpha = recipe.alpha / recipe.rank * int(rank)
                ranked = dataclasses.replace(recipe, rank=int(rank), alpha=alpha)
                yield chosen, ranked, gpus[int(card)]


def _windows(
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu,
    length: Any,
    chosen: Any,
) -> Iterator[tuple[Recipe, Any]]:
    """Those within the window of sliding attention, and those beyond it."""
    shortest, longest = int(length[chosen].min()), int(length[chosen].max())
    short = dataclasses.replace(recipe, sequence_length=shortest)
    window = parts_of(architecture, short, gpu).tape.window
    if window is None or longest <= window or shortest > window:
        yield short, chosen
        return
    yield short, chosen & (length <= window)
    beyond = dataclasses.replace(recipe, sequence_length=longest)
    yield beyond, chosen & (length > window)
