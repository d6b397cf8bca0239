"""What methods of pooled inputs have in common, without torch.

Source of the three: the published code of QA-LoRA (AvgPool1d before A) and of Q-BaRA
and QA-HiRA (xiaocaigou/qbaraqahira, peft/tuners/lora).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Choice, Kind
from memplan.methods import ADAPTER_KEYS, NO_OPTIONS, Flow, Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.recipe import Recipe

POOLING: Mapping[str, Kind] = {"pooling": Choice(("mean", "avg-pool", "sum"))}
"""mean and sum keep nothing of x; avg-pool, the published module, keeps x itself."""


class Pooled(Method):
    """Adapters of means of neighbouring inputs, written to groups of outputs."""

    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS | {"lambda_pattern"}
    carries_quantized: ClassVar[bool] = True
    by_lora: ClassVar[bool] = True

    @abstractmethod
    def groups(self, options: Mapping[str, Any]) -> tuple[int, int, int | None]:
        """Sizes of the groups of inputs and of outputs, and the inner width by rank.

        None for a single matrix without an inner width.
        """

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        inputs, outputs, factor = self.groups({**self.defaults, **options})
        pooled, grouped = linear.in_features // inputs, linear.out_features // outputs
        if factor is None:
            return ((grouped, pooled),)
        return (factor * rank, pooled), (grouped, factor * rank)

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """The pooled inputs, or what dropout keeps of them, and what B reads.

        AvgPool1d keeps its input: one of its own where it is cast.
        """
        options = {**self.defaults, **options}
        inputs, _, factor = self.groups(options)
        pooled = linear.in_features // inputs
        kept = flow.tokens * pooled * flow.adapter_bytes
        if inputs == 1:
            kept = flow.read_bytes(pooled)
        elif flow.dropout:
            kept = flow.dropped_bytes(pooled)
        if options["pooling"] == "avg-pool" and inputs > 1 and flow.casts:
            kept += flow.tokens * linear.in_features * flow.adapter_bytes
        inner = 0 if factor is None else factor * rank
        return kept + flow.tokens * inner * flow.adapter_bytes

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        from memplan.methods._variant import apply_variant

        return apply_variant(
            model,
            recipe,
            targets,
            self._variant_of(),
            {**self.defaults, **recipe.method_options},
            self.patterned_option,
        )

    def load(self, model: nn.Module, folder: str) -> nn.Module:
        from memplan.methods._variant import load_variant

        return load_variant(model, folder, self._variant_of())

    def _variant_of(self) -> Any:
        from memplan.methods._grouped import Groups, variant_of

        def groups_of(options: Mapping[str, Any]) -> Groups:
            inputs, outputs, factor = self.groups(options)
            return Groups(
                inputs=inputs,
                outputs=outputs,
                rank_factor=factor,
                pooling=options["pooling"],
            )

        return variant_of(groups_of)
