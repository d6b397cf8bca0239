"""ADAQ-LoRA's loss, and the surgery that takes masked triplets out of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from torch import Tensor, nn

ADAPTER = "default"
"""The one adapter that AdaLoRA trains."""

SIDES = {"lora_A": 0, "lora_E": 0, "lora_B": 1}
"""The side of each tensor along which triplets lie."""


class AdaqLoraModel(AdaLoraModel):  # type: ignore[misc]
    """AdaLoRA whose regulariser is squared and summed, as the paper writes it."""

    gamma: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model.forward(*args, **kwargs)
        if isinstance(outputs.get("loss"), Tensor):
            outputs["loss"] = outputs["loss"] + self.gamma * self._regulariser()
        return outputs

    def _regulariser(self) -> Tensor:
        """|P^T P - I|^2 + |Q Q^T - I|^2, summed over layers; Q is PEFT's A, P its B."""
        terms = []
        for _, layer in triplet_layers(self.model):
            q, p = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            identity = torch.eye(len(q), device=q.device, dtype=q.dtype)
            terms.append((q @ q.T - identity).square().sum())
            terms.append((p.T @ p - identity).square().sum())
        return torch.stack(terms).sum()


class PruningAllocator(RankAllocator):  # type: ignore[misc]
    """PEFT's allocator over triplets of which some are gone.

    Layers are called by the names of their singular values.
    """

    def __init__(self, allocator: RankAllocator, ranks: Mapping[str, int]) -> None:
        self.__dict__.update(allocator.__dict__)
        self.init_bgt: int = allocator.init_bgt
        self._ranks = ranks
        self._kept = {name: list(range(rank)) for name, rank in ranks.items()}
        """Which of its first triplets a layer still has."""
        self.staying: dict[str, list[int]] = {}
        """Which of the triplets that a layer has are to stay, where some are not."""

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Masks down to a budget; which of the first triplets are left."""
        first: int = self.init_bgt
        left = sum(map(len, self._kept.values()))
        if left > budget:
            # kthvalue counts from what there is, the schedule from what there was.
            self.init_bgt = left
            masked = super().mask_to_budget(model, budget)
            self.init_bgt = first
            for name, stays in masked.items():
                self._keep(name, [row for row, kept in enumerate(stays) if kept])
        return {
            name: [row in self._kept[name] for row in range(rank)]
            for name, rank in self._ranks.items()
        }

    def mask_using_rank_pattern(self, model: nn.Module, pattern: Any) -> None:
        """Leaves the model as it is: what is masked is gone."""

    def keep_first(self, num_triplets: int) -> None:
        """Keeps as many of each layer, the first ones."""
        for name, kept in self._kept.items():
            self._keep(name, list(range(min(num_triplets, len(kept)))))

    def _keep(self, name: str, rows: list[int]) -> None:
        if len(rows) < len(self._kept[name]):
            self.staying[name] = rows
            self._kept[name] = [self._kept[name][row] for row in rows]


def make_adaq(adapted: Any, gamma: float, *, prunes: bool) -> None:
    """Turns PEFT's AdaLoRA into ADAQ-LoRA, whose checkpoints it still reads."""
    model = adapted.base_model
    model.__class__ = AdaqLoraModel
    model.gamma = gamma
    if prunes:
        ranks = {
            f"{path}.lora_E.{ADAPTER}": len(layer.lora_E[ADAPTER])
            for path, layer in triplet_layers(model.model)
        }
        model.rankallocator = PruningAllocator(model.rankallocator, ranks)


def triplet_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have triplets, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, AdaLoraLayer):
            yield path, module


def remove_masked(model: AdaLoraModel, optimizer: torch.optim.Optimizer) -> None:
    """Takes masked triplets out: parameters, gradients, moments and importance."""
    allocator = model.rankallocator
    for path, layer in triplet_layers(model.model):
        rows = allocator.staying.pop(f"{path}.lora_E.{ADAPTER}", None)
        if rows is not None:
            _keep_rows(path, layer, rows, optimizer, allocator)


def _keep_rows(
    path: str,
    layer: Any,
    rows: list[int],
    optimizer: torch.optim.Optimizer,
    allocator: PruningAllocator,
) -> None:
    """Leaves a layer with the triplets of those rows."""
    for table, side in SIDES.items():
        old = getattr(layer, table)[ADAPTER]
        index = torch.tensor(rows, dtype=torch.int64, device=old.device)
        new = nn.Parameter(old.detach().index_select(side, index))
        if old.grad is not None:
            new.grad = old.grad.index_select(side, index)
        getattr(layer, table)[ADAPTER] = new
        _swap(optimizer, old, new, side, index)
        name = f"{path}.{table}.{ADAPTER}"
        for kept in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
            if name in kept:
                kept[name] = kept[name].index_select(side, index)
    layer.r[ADAPTER] = len(rows)


def _swap(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    side: int,
    index: Tensor,
) -> None:
    """Puts a parameter in the place of another, with that share of its moments."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    optimizer.state[new] = {
        key: value.index_select(side, index)
        if isinstance(value, Tensor) and value.shape == old.shape
        else value
        for key, value in state.items()
    }
