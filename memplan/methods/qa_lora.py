"""QA-LoRA: y = W x + s B A pool_L(x), s = alpha / r (Xu et al., 2024).

A is (r, i/L) and B is (o, r): what is added is the same for L inputs in a row, so that
it merges into the zero points of a base quantised in groups of L.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Integer, Kind
from memplan.methods import NO_OPTIONS, check_divides
from memplan.methods._pooled import POOLING, Pooled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architecture import Linear


class QaLora(Pooled):
    """LoRA that reads means of L neighbouring inputs."""

    summary: ClassVar[str] = "LoRA over means of neighbouring inputs"
    options: ClassVar[Mapping[str, Kind]] = {"group_size": Integer(1), **POOLING}
    defaults: ClassVar[Mapping[str, Any]] = {"group_size": 32, "pooling": "mean"}
    patterned_option: ClassVar[str | None] = "group_size"

    def groups(self, options: Mapping[str, Any]) -> tuple[int, int, int | None]:
        return options["group_size"], 1, 1

    def check_linear(
        self,
        path: str,
        linear: Linear,
        rank: int,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        size = {**self.defaults, **options}["group_size"]
        check_divides("group_size", size, path, inputs=linear.in_features)


PART = QaLora()
