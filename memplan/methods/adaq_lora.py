"""ADAQ-LoRA: AdaLoRA's triplets P L Q on a quantised base (Feng et al., 2024).

dW = P L Q with P (o, r), L diagonal and Q (r, i); the loss gains
gamma sum(|P^T P - I|^2 + |Q Q^T - I|^2), squared and summed. The least important of L
are masked on AdaLoRA's schedule; the paper defines neither importance nor schedule.

With `prune_physically` masked triplets are taken out of the model, with their gradients
and moments: the memory that the paper claims. Masking alone releases none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.errors import InputError
from memplan.fields import Flag, Kind, Number
from memplan.methods.adalora import SCHEDULE, Adalora, apply_adalora, target_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from memplan.recipe import Recipe

GAMMA = 1e-3
"""Weight of the regulariser, for which the paper gives none."""

PRUNABLE = ("adamw", "adamw-fused", "adamw-loop", "sgd", "sgd-momentum")
"""Optimizers whose moments have their parameter's shape, so that rows can go."""


class AdaqLora(Adalora):
    """AdaLoRA with the paper's regulariser, and triplets that can really go."""

    summary: ClassVar[str] = "AdaLoRA for quantised bases, whose triplets can really go"
    options: ClassVar[Mapping[str, Kind]] = {
        **{k: v for k, v in Adalora.options.items() if k != "orth_reg_weight"},
        "gamma": Number(0),
        "prune_physically": Flag(),
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        **{k: v for k, v in SCHEDULE.items() if k != "orth_reg_weight"},
        "gamma": GAMMA,
        "prune_physically": False,
    }

    def check_options(self, recipe: Recipe) -> None:
        super().check_options(recipe)
        if _prunes(recipe) and recipe.optimizer not in PRUNABLE:
            raise InputError(
                "optimizer",
                recipe.optimizer,
                "keeps states from which no triplets can be taken (prune_physically)",
                f"use one of: {', '.join(PRUNABLE)}",
            )

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        from memplan.methods._triplets import make_adaq

        adapted = apply_adalora(model, recipe, targets)
        gamma = recipe.method_options.get("gamma", GAMMA)
        make_adaq(adapted, gamma, prunes=_prunes(recipe))
        return adapted

    def after_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Updates importance, masks, and takes out what is masked where it is to go."""
        from memplan.methods._triplets import PruningAllocator, remove_masked

        super().after_step(model, optimizer, step)
        tuner: Any = model.base_model
        if isinstance(tuner.rankallocator, PruningAllocator):
            remove_masked(tuner, optimizer)

    def milestone(self, recipe: Recipe) -> str | None:
        return "prune" if _prunes(recipe) else None

    def reach_milestone(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer
    ) -> None:
        """The end of the schedule, with the target rank left to every layer."""
        from memplan.methods._triplets import remove_masked

        tuner: Any = model.base_model
        tuner.rankallocator.keep_first(target_rank(recipe))
        remove_masked(tuner, optimizer)


def _prunes(recipe: Recipe) -> bool:
    return bool(recipe.method_options.get("prune_physically", False))


PART = AdaqLora()
