"""HQQ of 2 bits a weight, with a scale and a zero point per 64."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._hqq import Hqq


class Hqq2bit(Hqq):
    """HQQ's codes of 2 bits."""

    summary: ClassVar[str] = "HQQ of 2 bits with a scale and a zero point per 64"
    bits: ClassVar[int | None] = 2


PART = Hqq2bit()
