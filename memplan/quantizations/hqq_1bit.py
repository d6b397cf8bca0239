"""HQQ of 1 bit a weight, with a scale and a zero point per 64."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._hqq import Hqq


class Hqq1bit(Hqq):
    """HQQ's codes of 1 bit."""

    summary: ClassVar[str] = "HQQ of 1 bit with a scale and a zero point per 64"
    bits: ClassVar[int | None] = 1


PART = Hqq1bit()
