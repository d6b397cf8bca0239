"""T2: what a rank is worth by the inputs that a layer sees (EVA, arXiv 2410.07170).

The loss of rank r is the share of its inputs' second moment that the r largest
directions leave out: 1 - sum_{j <= r} v_j. EVA ranks directions by v_j alone; here the
knapsack weighs them by their bytes, since one more rank at a wide layer costs more.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

EVIDENCE = (
    "Explained variance says what a layer's inputs are like, and not what adapting it "
    "gains: in memplan's own comparison at equal bytes its ranks lost to equal ones "
    "(+0.0118 nats a byte, ± 0.0045, on a small model; reports/benchmark_ranks.md)."
)

Spectrum = Sequence[float]
"""Shares of a layer's second moment by direction, the largest first; they sum to 1."""


def loss(spectrum: Spectrum, rank: int) -> float:
    """The share that so many directions leave out."""
    return max(0.0, 1.0 - sum(itertools.islice(spectrum, rank)))


def losses(
    spectra: Mapping[str, Spectrum],
    groups: Sequence[Sequence[str]],
    ranks: Sequence[int],
) -> list[list[float]]:
    """(groups, ranks): what each rank loses in all modules of a group."""
    return [
        [sum(loss(spectra[path], rank) for path in group) for rank in ranks]
        for group in groups
    ]
