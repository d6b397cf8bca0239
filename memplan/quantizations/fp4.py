"""FP4 of QLoRA (Dettmers et al., 2023): an absmax per 64 weights."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._four_bits import FourBits


class Fp4(FourBits):
    """bitsandbytes' FP4."""

    summary: ClassVar[str] = "bitsandbytes' FP4"
    quant_type: ClassVar[str] = "fp4"
    double: ClassVar[bool] = False


PART = Fp4()
