"""quanto's integers of 8 bits with a scale a row."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._quanto import Quanto


class QuantoInt8(Quanto):
    """quanto's codes of 8 bits."""

    summary: ClassVar[str] = "quanto's int8 with a scale a row"
    bits: ClassVar[int | None] = 8


PART = QuantoInt8()
