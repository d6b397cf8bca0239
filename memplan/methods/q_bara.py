"""Q-BaRA: y = W x + s repeat_l(B A pool_l(x)), s = alpha / r (Shen et al., 2024).

A is (l r, i/l) and B is (o/l, l r) for a factor l (lambda): simpler inputs and outputs
and a higher rank, for the same number of parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Integer, Kind
from memplan.methods import NO_OPTIONS, check_divides
from memplan.methods._pooled import POOLING, Pooled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architecture import Linear


class QBara(Pooled):
    """LoRA of lambda times the rank between pooled inputs and repeated outputs."""

    summary: ClassVar[str] = "LoRA of a higher rank between pooled inputs and outputs"
    options: ClassVar[Mapping[str, Kind]] = {"lambda": Integer(1), **POOLING}
    defaults: ClassVar[Mapping[str, Any]] = {"lambda": 2, "pooling": "mean"}
    patterned_option: ClassVar[str | None] = "lambda"

    def groups(self, options: Mapping[str, Any]) -> tuple[int, int, int | None]:
        return options["lambda"], options["lambda"], options["lambda"]

    def check_linear(
        self,
        path: str,
        linear: Linear,
        rank: int,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        factor = {**self.defaults, **options}["lambda"]
        sides = {"inputs": linear.in_features, "outputs": linear.out_features}
        check_divides("lambda", factor, path, **sides)


PART = QBara()
