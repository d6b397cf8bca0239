"""VeRA: y = W x + b * (B (d * (A dropout(x)))) (Kopiczko et al., 2024).

A and B are random, frozen and shared by all layers, as large as the largest needs; d of
length r and b of length o are trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Integer, Kind, Number
from memplan.methods import MASK_BYTES, NO_OPTIONS, Flow, Method
from memplan.methods.lora import common_keys, wrap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.recipe import Recipe


class Vera(Method):
    """Two trained vectors a layer around shared random matrices."""

    summary: ClassVar[str] = "two vectors a layer around shared random matrices"
    uses: ClassVar[frozenset[str]] = frozenset(
        {
            "rank",
            "dropout",
            "targets",
            "trained_modules",
            "adapter_dtype",
            "input_casts",
        }
    )
    options: ClassVar[Mapping[str, Kind]] = {
        "d_initial": Number(0),
        "projection_prng_key": Integer(0),
    }
    carries_quantized: ClassVar[bool] = True

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        return (linear.out_features,), (rank,)

    def shared_shapes(
        self, linears: Iterable[Linear], rank: int
    ) -> tuple[tuple[int, ...], ...]:
        adapted = list(linears)
        widest_in = max(linear.in_features for linear in adapted)
        widest_out = max(linear.out_features for linear in adapted)
        return (rank, widest_in), (widest_out, rank)

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """What d and b multiply; the frozen A keeps nothing of x but dropout's mask."""
        mask = flow.tokens * linear.in_features * MASK_BYTES if flow.dropout else 0
        numbers = flow.tokens * (rank + linear.out_features)
        return mask + numbers * flow.adapter_bytes

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        import peft

        config = peft.VeraConfig(
            r=recipe.rank,
            vera_dropout=recipe.dropout,
            **common_keys(recipe, targets),
            **recipe.method_options,
        )
        return wrap(model, recipe, config)


PART = Vera()
