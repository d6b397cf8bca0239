"""Lion with a paged 8-bit momentum (bitsandbytes.optim.PagedLion8bit)."""

from __future__ import annotations

from typing import ClassVar

from memplan.optimizers._bitsandbytes import Bitsandbytes


class PagedLion8bit(Bitsandbytes):
    """Lion, momentum in 8 bits, paged."""

    summary: ClassVar[str] = "bitsandbytes' Lion, momentum in 8 bits, paged"
    class_name: ClassVar[str] = "PagedLion8bit"
    num_states: ClassVar[int] = 1
    eight_bits: ClassVar[bool] = True
    paged: ClassVar[bool] = True


PART = PagedLion8bit()
