"""HQQ of 3 bits a weight, with a scale and a zero point per 64."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._hqq import Hqq


class Hqq3bit(Hqq):
    """HQQ's codes of 3 bits."""

    summary: ClassVar[str] = "HQQ of 3 bits with a scale and a zero point per 64"
    bits: ClassVar[int | None] = 3


PART = Hqq3bit()
