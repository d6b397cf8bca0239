"""AdamW with 8-bit moments in managed memory (bitsandbytes.optim.PagedAdamW8bit)."""

from __future__ import annotations

from typing import ClassVar

from memplan.optimizers._bitsandbytes import Bitsandbytes


class PagedAdamW8bit(Bitsandbytes):
    """AdamW, moments in 8 bits, paged."""

    summary: ClassVar[str] = "bitsandbytes' AdamW, moments in 8 bits, paged"
    class_name: ClassVar[str] = "PagedAdamW8bit"
    num_states: ClassVar[int] = 2
    eight_bits: ClassVar[bool] = True
    paged: ClassVar[bool] = True


PART = PagedAdamW8bit()
