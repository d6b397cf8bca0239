"""What linear layers see: the spectrum of their inputs over a few batches.

Forward passes only, without gradients. X holds a layer's inputs of a batch, one row a
token; the squares of its singular values are shares of the inputs' second moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED_TOKENS = 512
"""Rows of X that are looked at in a batch, evenly spaced: they bound its rank, and keep
the decomposition of a wide layer's inputs to a matrix of this size."""


def input_spectra(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], paths: Iterable[str]
) -> dict[str, list[float]]:
    """Shares of the inputs' second moment by direction, largest first, by path.

    Each batch is the model's keyword arguments. The shares are means over batches.
    """
    modules = {path: model.get_submodule(path) for path in paths}
    sums: dict[str, list[Tensor]] = defaultdict(list)
    handles = [
        module.register_forward_pre_hook(_keeper(sums[path]))
        for path, module in modules.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: _mean(shares) for path, shares in sums.items()}


def shares_of(inputs: Tensor) -> Tensor:
    """Shares of the second moment of inputs (..., i), by direction, largest first."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    rows = rows[:: max(1, len(rows) // SAMPLED_TOKENS)][:SAMPLED_TOKENS]
    squares: Tensor = torch.linalg.svdvals(rows.double().cpu()) ** 2
    return squares.div(squares.sum().clamp_min(torch.finfo(squares.dtype).tiny))


def _keeper(shares: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shares.append(shares_of(inputs[0]))

    return keep


def _mean(shares: list[Tensor]) -> list[float]:
    shortest = min(map(len, shares))
    mean: Tensor = torch.stack([one[:shortest] for one in shares]).mean(dim=0)
    return [float(share) for share in mean]
