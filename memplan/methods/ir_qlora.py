"""IR-QLoRA: LoRA with an elastic connection on calibrated NF4 (Qin et al., 2024).

U = A dropout(x) + b1 mean(x), y = W x + s (B U + b2 repeat(U)); b1 and b2 are trained
numbers. The calibration of W is the quantisation `nf4-icq`; the connection itself runs
on any base. `forward` says how nf4-icq multiplies: `recomputed` dequantises again in
backward, `official` keeps the dense weight as the published code does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Choice, Kind
from memplan.methods import NO_OPTIONS, check_divides
from memplan.methods.lora import LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.methods import Flow
    from memplan.recipe import Recipe


class IrQlora(LowRank):
    """Low-rank adapters with an elastic connection."""

    summary: ClassVar[str] = "LoRA with an elastic connection, for calibrated NF4"
    options: ClassVar[Mapping[str, Kind]] = {
        "forward": Choice(("recomputed", "official"))
    }
    defaults: ClassVar[Mapping[str, Any]] = {"forward": "recomputed"}

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        return *super().parameter_shapes(linear, rank, options), (1,), (1,)

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """LoRA's, and the means that b1 multiplies."""
        lora = super().saved_bytes(linear, rank, flow, options)
        return lora and lora + flow.tokens * rank * flow.adapter_bytes

    def check_linear(
        self,
        path: str,
        linear: Linear,
        rank: int,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        sides = {"inputs": linear.in_features, "outputs": linear.out_features}
        check_divides("rank", rank, path, **sides)

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        from memplan.methods import _elastic, options_at
        from memplan.methods._variant import apply_variant

        options = options_at(recipe, "")
        for module in model.modules():
            if hasattr(module, "recomputes"):
                module.recomputes = options["forward"] == "recomputed"
        return apply_variant(model, recipe, targets, _elastic.variant_of, options)

    def load(self, model: nn.Module, folder: str) -> nn.Module:
        from memplan.methods import _elastic
        from memplan.methods._variant import load_variant

        return load_variant(model, folder, _elastic.variant_of)


PART = IrQlora()
