"""Every adapter parameter is worth the same, so that the same rank is best everywhere.

A rank costs (i + o) parameters at a layer of i inputs and o outputs, and is worth as
much: loss and bytes then rise alike in every module.
"""

from __future__ import annotations

from typing import ClassVar

from memplan.architecture import Linear
from memplan.planner.value.priors import Prior


class PerParameter(Prior):
    """Weight i + o: what one rank costs."""

    summary: ClassVar[str] = "every parameter is worth the same: equal ranks"
    evidence: ClassVar[tuple[str, ...]] = (
        "What nearly everybody trains with, and what careful comparisons at equal "
        "parameters have not beaten (FIM-LoRA: no gain over equal ranks on GLUE and "
        "commonsense tasks).",
        "The default, by memplan's own comparison at equal bytes on a small model "
        "(reports/benchmark_ranks.md): no prior was shown to gain as much as a tenth "
        "of what halving the ranks loses.",
    )

    def weight(self, linear: Linear) -> float:
        return float(linear.in_features + linear.out_features)


PART = PerParameter()
