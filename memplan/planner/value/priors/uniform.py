"""Every module is worth the same, whatever its size."""

from __future__ import annotations

from typing import ClassVar

from memplan.architecture import Linear
from memplan.planner.value.priors import Prior


class Uniform(Prior):
    """Weight 1 for every module: small ones, being cheaper, get higher ranks."""

    summary: ClassVar[str] = "every module is worth the same"
    evidence: ClassVar[tuple[str, ...]] = (
        "The absence of an opinion by module; rank goes where its bytes are few.",
        "memplan's own comparison at equal bytes, on a small model: worse than equal "
        "ranks by 0.0054 nats a byte, +- 0.0045 (reports/benchmark_ranks.md).",
    )

    def weight(self, linear: Linear) -> float:
        return 1.0


PART = Uniform()
