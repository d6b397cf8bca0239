"""HQQ of 4 bits a weight, with a scale and a zero point per 64."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._hqq import Hqq


class Hqq4bit(Hqq):
    """HQQ's codes of 4 bits."""

    summary: ClassVar[str] = "HQQ of 4 bits with a scale and a zero point per 64"
    bits: ClassVar[int | None] = 4


PART = Hqq4bit()
