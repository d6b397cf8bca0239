"""quanto's integers of 2 bits with a scale and a shift a group of 128."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._quanto import Quanto


class QuantoInt2(Quanto):
    """quanto's codes of 2 bits."""

    summary: ClassVar[str] = "quanto's int2 with a scale and a shift per 128"
    bits: ClassVar[int | None] = 2


PART = QuantoInt2()
