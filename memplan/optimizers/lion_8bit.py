"""Lion with its momentum in 8 bits (bitsandbytes.optim.Lion8bit)."""

from __future__ import annotations

from typing import ClassVar

from memplan.optimizers._bitsandbytes import Bitsandbytes


class Lion8bit(Bitsandbytes):
    """Lion, momentum in 8 bits."""

    summary: ClassVar[str] = "bitsandbytes' Lion, momentum in 8 bits"
    class_name: ClassVar[str] = "Lion8bit"
    num_states: ClassVar[int] = 1
    eight_bits: ClassVar[bool] = True
    paged: ClassVar[bool] = False


PART = Lion8bit()
