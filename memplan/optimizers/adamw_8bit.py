"""AdamW with both moments in 8 bits (bitsandbytes.optim.AdamW8bit)."""

from __future__ import annotations

from typing import ClassVar

from memplan.optimizers._bitsandbytes import Bitsandbytes


class AdamW8bit(Bitsandbytes):
    """AdamW, moments in 8 bits."""

    summary: ClassVar[str] = "bitsandbytes' AdamW, moments in 8 bits"
    class_name: ClassVar[str] = "AdamW8bit"
    num_states: ClassVar[int] = 2
    eight_bits: ClassVar[bool] = True
    paged: ClassVar[bool] = False


PART = AdamW8bit()
