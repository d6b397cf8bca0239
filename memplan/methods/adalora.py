"""AdaLoRA: y = W x + (alpha / r) B (E A) dropout(x), E diagonal (Zhang et al., 2023).

A is (r, i), E is (r, 1), B is (o, r), r the initial rank. Rows of E of the least
important triplets are set to zero on a schedule, until `target_rank` of them a layer
are left on average; nothing is released by that.

Importance is smoothed in three float32 tensors a trained tensor, from the first step
until `tfinal` steps before the last (peft.tuners.adalora.layer, `RankAllocator`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.errors import InputError
from memplan.fields import Integer, Kind, Number
from memplan.methods import ADAPTER_KEYS, NO_OPTIONS, SINGLE_BYTES, Flow, Method
from memplan.methods.lora import common_keys, wrap

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from memplan.architecture import Linear
    from memplan.recipe import Recipe

IMPORTANCE_TENSORS = 3
"""The importance of a step, and the averages of it and of its uncertainty."""

SCHEDULE: Mapping[str, Any] = {
    "total_step": 1000,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
}
"""AdaLoraConfig's own defaults, and a length, for which it has none."""


class Adalora(Method):
    """Triplets whose number falls where they matter least, as PEFT installs them."""

    summary: ClassVar[str] = "LoRA by triplets, the least important masked on the way"
    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS - {"rank_pattern", "alpha_pattern"}
    options: ClassVar[Mapping[str, Kind]] = {
        "target_rank": Integer(1),
        "total_step": Integer(1),
        "tinit": Integer(0),
        "tfinal": Integer(0),
        "deltaT": Integer(1),
        "beta1": Number(0, below=1, above_minimum=True),
        "beta2": Number(0, below=1, above_minimum=True),
        "orth_reg_weight": Number(0),
    }
    carries_quantized: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = SCHEDULE
    optimizer_bytes_per_number: ClassVar[int] = IMPORTANCE_TENSORS * SINGLE_BYTES

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        return (rank, linear.in_features), (linear.out_features, rank), (rank, 1)

    def frozen_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        """The initial rank, as a number on the card (`ranknum`)."""
        return ((1,),)

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """What A reads, E A, what B reads, and the rank that is divided by."""
        scaled = rank * linear.in_features
        inner = flow.tokens * rank
        kept = (scaled + inner + 1) * flow.adapter_bytes
        return flow.read_bytes(linear.in_features) + kept

    def check_options(self, recipe: Recipe) -> None:
        super().check_options(recipe)
        target = target_rank(recipe)
        if target >= recipe.rank:
            raise InputError(
                "method_options.target_rank",
                target,
                f"is not below the rank {recipe.rank} that training starts with",
                "give a smaller one, or a larger rank",
            )
        schedule = {**SCHEDULE, **recipe.method_options}
        last = schedule["total_step"] - schedule["tfinal"]
        if schedule["tinit"] >= last:
            raise InputError(
                "method_options.tinit",
                schedule["tinit"],
                f"leaves no step for masking before step {last} of total_step "
                f"{schedule['total_step']} less tfinal {schedule['tfinal']}",
                "lower tinit or tfinal, or raise total_step",
            )

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_adalora(model, recipe, targets)

    def after_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Updates importance from the gradients, and masks."""
        model.base_model.update_and_allocate(step)  # type: ignore[operator, union-attr]


def target_rank(recipe: Recipe) -> int:
    """The mean rank of a layer at the end; half the initial one unless given."""
    rank: int = recipe.method_options.get("target_rank", recipe.rank // 2 or 1)
    return rank


def apply_adalora(
    model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
) -> nn.Module:
    """PEFT's AdaLoRA on the modules of those paths."""
    import peft

    schedule = {**SCHEDULE, **recipe.method_options}
    config = peft.AdaLoraConfig(
        init_r=recipe.rank,
        target_r=target_rank(recipe),
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        **common_keys(recipe, targets),
        **{key: schedule[key] for key in SCHEDULE},
    )
    adapted = wrap(model, recipe, config)
    # PEFT 0.21 makes the rank a trained number where adapters change their precision
    # (`_move_adapter_to_device_of_base_layer` puts it into its dictionary anew).
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    return adapted


PART = Adalora()
