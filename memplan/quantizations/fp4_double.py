"""FP4 of QLoRA (Dettmers et al., 2023): an absmax per 64 weights, quantised again."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._four_bits import FourBits


class Fp4Double(FourBits):
    """bitsandbytes' FP4, its absmax quantised again."""

    summary: ClassVar[str] = "bitsandbytes' FP4, its absmax quantised again"
    quant_type: ClassVar[str] = "fp4"
    double: ClassVar[bool] = True


PART = Fp4Double()
