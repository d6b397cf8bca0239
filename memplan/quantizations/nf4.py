"""NF4 of QLoRA (Dettmers et al., 2023): an absmax per 64 weights."""

from __future__ import annotations

from typing import ClassVar

from memplan.quantizations._four_bits import FourBits


class Nf4(FourBits):
    """bitsandbytes' NF4."""

    summary: ClassVar[str] = "bitsandbytes' NF4"
    quant_type: ClassVar[str] = "nf4"
    double: ClassVar[bool] = False


PART = Nf4()
