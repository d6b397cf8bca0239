"""HQQ of 8 bits a weight, with a scale and a zero point per 64."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._hqq import Hqq


class Hqq8bit(Hqq):
    """HQQ's codes of 8 bits."""

    summary: ClassVar[str] = "HQQ of 8 bits with a scale and a zero point per 64"
    bits: ClassVar[int | None] = 8


PART = Hqq8bit()
