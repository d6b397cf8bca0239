"""quanto's integers of 4 bits with a scale and a shift a group of 128."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._quanto import Quanto


class QuantoInt4(Quanto):
    """quanto's codes of 4 bits."""

    summary: ClassVar[str] = "quanto's int4 with a scale and a shift per 128"
    bits: ClassVar[int | None] = 4


PART = QuantoInt4()
