"""Adapters that read means of neighbouring inputs and write to groups of outputs.

y = W x + s repeat_q(B A mean_p(x)), or C in the place of B A. Groups of p inputs and of
q outputs; A is (r', i/p), B is (o/q, r'), C is (o/q, i/p).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from memplan.methods._variant import Variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """How inputs are pooled and outputs repeated."""

    inputs: int
    outputs: int
    rank_factor: int | None
    """How many times the rank the inner width is; None for a single matrix."""
    pooling: str
    """mean: keeps nothing; avg-pool: torch's AvgPool1d, which keeps x; sum."""


class GroupedVariant(Variant):
    """Pools, multiplies, repeats."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def init(self, module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Puts smaller matrices in the place of PEFT's A and B."""
        groups, rank = self._groups, module.r[adapter_name]
        weight = module.lora_A[adapter_name].weight
        at = {"device": weight.device, "dtype": weight.dtype, "bias": False}
        pooled = module.in_features // groups.inputs
        grouped = module.out_features // groups.outputs
        if groups.rank_factor is None:
            first: nn.Linear = nn.Linear(pooled, grouped, **at)
            nn.init.zeros_(first.weight)
            module.lora_A[adapter_name] = first
            module.lora_B[adapter_name] = nn.Identity()
            return
        inner = rank * groups.rank_factor
        module.lora_A[adapter_name] = nn.Linear(pooled, inner, **at)
        last = nn.Linear(inner, grouped, **at)
        nn.init.zeros_(last.weight)
        module.lora_B[adapter_name] = last

    def forward(
        self,
        module: Any,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Dropout acts on the pooled inputs, as in the published code."""
        pooled = pool(x, self._groups.inputs, self._groups.pooling)
        inner = module.lora_A[active_adapter](
            module.lora_dropout[active_adapter](pooled)
        )
        added: torch.Tensor = module.lora_B[active_adapter](inner)
        added = added * module.scaling[active_adapter]
        if self._groups.outputs > 1:
            added = added.repeat_interleave(self._groups.outputs, dim=-1)
        summed: torch.Tensor = result + added
        return summed

    def delta(self, module: Any, adapter: str) -> torch.Tensor:
        groups = self._groups
        inner: torch.Tensor = module.lora_A[adapter].weight
        if groups.rank_factor is not None:
            inner = module.lora_B[adapter].weight @ inner
        if groups.pooling != "sum":
            inner = inner / groups.inputs
        scaling: float = module.scaling[adapter]
        rows = (inner * scaling).repeat_interleave(groups.outputs, 0)
        return rows.repeat_interleave(groups.inputs, 1)


def pool(x: torch.Tensor, size: int, pooling: str) -> torch.Tensor:
    """Means (or sums) of `size` neighbouring features, (..., i) -> (..., i / size)."""
    if size == 1:
        return x
    if pooling == "avg-pool":
        rows: torch.Tensor = F.avg_pool1d(x.reshape(-1, 1, x.shape[-1]), size)
        return rows.reshape(*x.shape[:-1], -1)
    grouped: torch.Tensor = x.unflatten(-1, (-1, size))
    return grouped.sum(-1) if pooling == "sum" else grouped.mean(-1)


def variant_of(groups_of: Any) -> Any:
    """What makes a layer's variant from its options."""

    def make(options: Mapping[str, Any]) -> GroupedVariant:
        return GroupedVariant(groups_of(options))

    return make
