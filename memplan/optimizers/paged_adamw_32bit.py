"""AdamW with float32 moments in managed memory (bitsandbytes.optim.PagedAdamW32bit)."""

from __future__ import annotations

from typing import ClassVar

from memplan.optimizers._bitsandbytes import Bitsandbytes


class PagedAdamW32bit(Bitsandbytes):
    """AdamW, moments in float32, paged."""

    summary: ClassVar[str] = "bitsandbytes' AdamW, moments in float32, paged"
    class_name: ClassVar[str] = "PagedAdamW32bit"
    num_states: ClassVar[int] = 2
    eight_bits: ClassVar[bool] = False
    paged: ClassVar[bool] = True


PART = PagedAdamW32bit()
