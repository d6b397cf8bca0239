"""QA-HiRA: y = W x + s repeat_m(C pool_l(x)), s = alpha / r (Shen et al., 2024).

C is (o/m, i/l) for factors l and m (lambda1 and lambda2): a single matrix of full rank,
which is the same for l x m neighbouring weights. The rank is read for the scale alone.
C starts at zero, which the published code leaves open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Integer, Kind
from memplan.methods import NO_OPTIONS, check_divides
from memplan.methods._pooled import POOLING, Pooled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architecture import Linear


class QaHira(Pooled):
    """A single matrix between pooled inputs and repeated outputs.

    A recipe's `lambda_pattern` sets lambda1.
    """

    summary: ClassVar[str] = "a single matrix between pooled inputs and outputs"
    options: ClassVar[Mapping[str, Kind]] = {
        "lambda1": Integer(1),
        "lambda2": Integer(1),
        **POOLING,
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "lambda1": 4,
        "lambda2": 8,
        "pooling": "mean",
    }
    patterned_option: ClassVar[str | None] = "lambda1"

    def groups(self, options: Mapping[str, Any]) -> tuple[int, int, int | None]:
        return options["lambda1"], options["lambda2"], None

    def check_linear(
        self,
        path: str,
        linear: Linear,
        rank: int,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        given = {**self.defaults, **options}
        check_divides("lambda1", given["lambda1"], path, inputs=linear.in_features)
        check_divides("lambda2", given["lambda2"], path, outputs=linear.out_features)


PART = QaHira()
